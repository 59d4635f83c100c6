//! The control protocol: requests and responses of vswitchd, typed.
//!
//! One JSON object a line over a unix stream socket, a response for each request, in order. `socat - UNIX:PATH` is a
//! debugger:
//!
//! ```json
//! {"version":1,"request":{"op":"status"}}
//! {"version":1,"ok":{"kind":"status","version":"0.1.0", ... }}
//! {"version":1,"error":{"code":"not_found","message":"no network \"x\": `switchctl network list` shows them"}}
//! ```
//!
//! A line longer than [`MAX_LINE_BYTES`] or one that is no request is answered by an error, and the connection closes.
#![forbid(unsafe_code)]

mod client;
mod counts;
mod defaults;
mod error;
mod network;
mod policy;
mod port;
mod request;
mod response;
mod rxq;
mod service;

pub use client::{Client, ClientError};
pub use counts::{DropInfo, FlowInfo, PerfInfo, PortStats, SocketInfo, StageInfo, StatsInfo, WorkerInfo};
pub use error::{ApiError, ErrorCode, sentence};
pub use network::{
    Encap, FdbSpec, FdbTarget, MirrorDirection, MirrorSpec, NetworkMode, NetworkSpec, PeerSpec, RouteSpec, StormLimits,
};
pub use policy::{
    ChangeInfo, ConnectionFilter, ConnectionInfo, ConnectionsInfo, EndpointInfo, EndpointName, EndpointSpec,
    ExplainInfo, ExplainSpec, ExplainedEnd, ExplainedRule, FlowEvent, NamedPort, ObjectName, ObserveFilter,
    PolicyDetail, PolicyDocument, PolicyInfo, RuleInfo,
};
pub use port::{Attachment, Bandwidth, PortMapping, PortSpec, Protocol, SenderCheck};
pub use request::Request;
pub use response::{
    Answer, FdbInfo, GroupInfo, HostInfo, IpamInfo, NeighborInfo, NetworkInfo, OffloadInfo, OffloadLinkInfo, PeerInfo,
    PodRoute, PortInfo, RouteInfo, StatusInfo, UplinkInfo,
};

pub use rxq::{QueueInfo, QueueLoad, QueueMove, RxqInfo, RxqPlan, WorkerLoad};
pub use service::{Affinity, BackendInfo, EgressInfo, EgressSpec, ServiceInfo, ServiceSpec};

use serde::{Deserialize, Serialize};

/// Version of the protocol. A daemon refuses others and says which it speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest request line, newline included.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vswitch/vswitchd.sock";

/// A request line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// The request.
    pub request: Request,
}

/// A response line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResponseLine {
    /// [`PROTOCOL_VERSION`] of the daemon.
    pub version: u32,
    /// The answer or the error.
    #[serde(flatten)]
    pub result: ResponseResult,
}

/// What a response line holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseResult {
    /// Done.
    Ok(Answer),
    /// Refused or failed; nothing was changed.
    Error(ApiError),
}

impl From<Result<Answer, ApiError>> for ResponseLine {
    fn from(result: Result<Answer, ApiError>) -> Self {
        let result = match result {
            Ok(answer) => ResponseResult::Ok(answer),
            Err(error) => ResponseResult::Error(error),
        };
        ResponseLine { version: PROTOCOL_VERSION, result }
    }
}
