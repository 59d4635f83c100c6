//! MAC addresses.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 48-bit Ethernet address, in wire order.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// A string that is no MAC address.
#[derive(Debug, PartialEq, Eq)]
pub struct MacParseError(String);

impl MacAddr {
    /// All ones.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);

    /// Group bit set: multicast or broadcast (IEEE 802-2014 section 8.2).
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// All six bytes zero: never a station's address.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 6]
    }

    /// The address in the low 48 bits of a word, first byte highest.
    pub fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The IPv6 link-local address that it gives (RFC 4291 appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
    }

    /// A unicast, locally administered address made of the low 40 bits of `seed`.
    pub fn local_from(seed: u64) -> MacAddr {
        let bytes = seed.to_be_bytes();
        MacAddr([0x0a, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<MacAddr, MacParseError> {
        let wrong = || MacParseError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(MacAddr(bytes)) }
    }
}

impl fmt::Display for MacParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" is no MAC address: write six pairs of hex digits, as 02:00:00:00:00:01", self.0)
    }
}

impl std::error::Error for MacParseError {}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MacAddr, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints() {
        let mac = MacAddr([0x02, 0, 0xab, 0xcd, 0xef, 0x01]);
        assert_eq!(mac.to_string(), "02:00:ab:cd:ef:01");
        assert_eq!("02:00:AB:cd:ef:01".parse(), Ok(mac));
        assert_eq!("02-00-ab-cd-ef-01".parse(), Ok(mac));
    }

    #[test]
    fn refuses_what_is_not_six_pairs() {
        for text in
            ["", "02:00:ab:cd:ef", "02:00:ab:cd:ef:01:02", "2:0:ab:cd:ef:01", "02:00:ab:cd:ef:0g", "02:00:ab:cd:ef:+1"]
        {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn local_addresses_are_unicast() {
        let mac = MacAddr::local_from(u64::MAX);
        assert!(!mac.is_multicast());
        assert_eq!(mac.0[0] & 2, 2);
    }
}
