//! `pktgen rtt` and `pktgen answer`: round trips between two stacks by plain sockets, as programs in pods see them.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::clock::{Clock, monotonic_ns};
use crate::{Count, Time, latency};

/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of a question and of its answer: the question's number.
const MESSAGE: usize = 4;

/// What carries a question.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Transport {
    /// Over one UDP socket.
    Udp,
    /// Over one TCP connection.
    Tcp,
    /// Over a TCP connection of its own.
    Connect,
}

/// `pktgen rtt`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where `pktgen answer` listens.
    #[arg(long)]
    to: SocketAddr,
    /// What carries a question.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    transport: Transport,
    /// Questions a second; the next one as soon as the last is answered unless named.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: Option<u64>,
    /// Write the latencies to this file, in HdrHistogram's log format (nanoseconds).
    #[arg(long)]
    hdr: Option<PathBuf>,
    #[command(flatten)]
    time: Time,
}

/// Asks until the time is over; the latency is that of a whole round trip.
pub(crate) fn run(options: &Options) -> anyhow::Result<Count> {
    let mut ask = asker(options)?;
    let mut latency = latency::histogram();
    let mut clock = Clock::start(options.time);
    let start_ns = monotonic_ns();
    let mut count = Count::default();
    while !clock.is_over() {
        let mut due_ns = None;
        if let Some(rate) = options.rate {
            let due = Duration::from_secs_f64((count.packets + count.refused) as f64 / rate as f64);
            // Sleeping is part of it: a program that asks now and then has a core that has gone idle.
            thread::park_timeout(due.saturating_sub(clock.elapsed()));
            due_ns = Some(start_ns + due.as_nanos() as u64);
        }
        // At a rate a question that had to wait for the answer before it has waited, too.
        let now_ns = monotonic_ns();
        let sent_ns = due_ns.map_or(now_ns, |due| due.min(now_ns));
        if ask()? {
            latency.saturating_record(monotonic_ns() - sent_ns);
            count.packets += 1;
            count.bytes += MESSAGE as u64;
        } else {
            count.refused += 1;
        }
        clock.progress(&count);
    }
    count.seconds = clock.elapsed().as_secs_f64();
    if let Some(file) = &options.hdr {
        latency::write(&latency, file)?;
    }
    Ok(Count { latency: latency::Summary::of(&latency), ..count })
}

/// Asks one question; false if the answer is lost.
fn asker(options: &Options) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<bool>>> {
    let to = options.to;
    let connect = move || -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let refused = move || format!("{to} does not answer: is `pktgen answer` there?");
    let mut number = 0_u32;
    let mut next = move || {
        number = number.wrapping_add(1);
        number.to_be_bytes()
    };
    Ok(match options.transport {
        Transport::Udp => {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Box::new(move || {
                let message = next();
                socket.send(&message)?;
                loop {
                    let mut answer = [0; MESSAGE];
                    match socket.recv(&mut answer) {
                        Ok(MESSAGE) if answer == message => return Ok(true),
                        // Late, or twice.
                        Ok(_) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                        Err(error) => return Err(error).with_context(refused),
                    }
                }
            })
        }
        Transport::Tcp => {
            let mut stream = connect().with_context(refused)?;
            Box::new(move || {
                let mut message = next();
                stream.write_all(&message)?;
                stream.read_exact(&mut message).with_context(refused)?;
                Ok(true)
            })
        }
        Transport::Connect => Box::new(move || {
            let mut stream = connect().with_context(refused)?;
            let mut message = next();
            stream.write_all(&message)?;
            stream.read_exact(&mut message).with_context(refused)?;
            Ok(true)
        }),
    })
}

/// Answers questions over UDP and TCP until the time is over.
pub(crate) fn answer(at: SocketAddr, time: Time) -> anyhow::Result<Count> {
    let taken = || format!("cannot listen at {at}");
    let udp = UdpSocket::bind(at).with_context(taken)?;
    let tcp = TcpListener::bind(at).with_context(taken)?;
    let answered: Arc<Answered> = Arc::default();
    let by_udp = answered.clone();
    thread::spawn(move || {
        let mut message = [0; 1500];
        while let Ok((length, from)) = udp.recv_from(&mut message) {
            // An answer that cannot go is one that the other side does not count.
            if udp.send_to(&message[..length], from).is_ok() {
                by_udp.add(length);
            }
        }
    });
    let by_tcp = answered.clone();
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            let by_tcp = by_tcp.clone();
            thread::spawn(move || echo(stream, &by_tcp));
        }
    });
    let mut clock = Clock::start(time);
    while !clock.is_over() {
        thread::park_timeout(Duration::from_millis(10));
        clock.progress(&answered.count());
    }
    Ok(Count { seconds: clock.elapsed().as_secs_f64(), ..answered.count() })
}

/// Answers of all threads.
#[derive(Debug, Default)]
struct Answered {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Answered {
    fn add(&self, bytes: usize) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn count(&self) -> Count {
        let (packets, bytes) = (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        Count { packets, bytes, ..Count::default() }
    }
}

fn echo(mut stream: TcpStream, answered: &Answered) {
    let mut message = [0; 1500];
    while let Ok(length @ 1..) = stream.read(&mut message) {
        if stream.write_all(&message[..length]).is_err() {
            return;
        }
        answered.add(length);
    }
}
