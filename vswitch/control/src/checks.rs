//! Checks that several requests share, and the errors that they give.

use std::net::IpAddr;

use ipnet::IpNet;
use vswitch_api::{ApiError, ErrorCode};
use vswitch_net::MacAddr;

pub(crate) fn full_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

pub(crate) fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(is_good) {
        return Err(invalid(format!("\"{name}\" is no name for a {what}: 1 to 63 letters, digits, '-', '_' or '.'")));
    }
    Ok(())
}

pub(crate) fn check_mac(key: &str, mac: MacAddr) -> Result<(), ApiError> {
    if mac.is_multicast() || mac.is_zero() {
        return Err(invalid(format!(
            "{key}: {mac} is no station's address: choose a unicast one, as 02:00:00:00:00:01"
        )));
    }
    Ok(())
}

pub(crate) fn check_unicast(key: &str, address: IpAddr) -> Result<(), ApiError> {
    let is_wrong = address.is_unspecified()
        || address.is_multicast()
        || address.is_loopback()
        || match address {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
    if is_wrong {
        return Err(invalid(format!(
            "{key}: {address} is not allowed; allowed are unicast addresses that are routable"
        )));
    }
    Ok(())
}

pub(crate) fn check_prefix(key: &str, prefix: &IpNet) -> Result<(), ApiError> {
    if prefix.addr() != prefix.network() {
        return Err(invalid(format!("{key}: {prefix} has bits set after its length: write {}", prefix.trunc())));
    }
    Ok(())
}

pub(crate) fn check_prefixes(key: &str, prefixes: &[IpNet]) -> Result<(), ApiError> {
    for (at, prefix) in prefixes.iter().enumerate() {
        check_prefix(key, prefix)?;
        if let Some(other) = prefixes[..at].iter().find(|other| other.contains(prefix) || prefix.contains(*other)) {
            return Err(invalid(format!("{key}: {prefix} and {other} overlap: keep one of them")));
        }
    }
    Ok(())
}

pub(crate) fn list(prefixes: &[IpNet]) -> String {
    prefixes.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Invalid, message)
}

pub(crate) fn conflict(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Conflict, message)
}

pub(crate) fn exhausted(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Exhausted, message)
}
