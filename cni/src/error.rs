//! CNI errors: the specification's codes and a sentence with the remedy (CNI specification, section 5, "Error").

use serde::Serialize;
use vswitch_api::{ApiError, ClientError, ErrorCode};
use vswitch_link::LinkError;
use vswitch_link::plug::PlugError;

/// Codes of the specification; those from 100 on are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    IncompatibleVersion = 1,
    UnknownContainer = 3,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfig = 7,
    TryAgain = 11,
    Unavailable = 50,
    Limited = 51,
    /// The kernel or the daemon refused.
    Refused = 100,
    /// The container has the interface already.
    Exists = 101,
    /// CHECK found something else than was set up.
    Drift = 102,
}

/// What is printed when a command fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CniError {
    pub(crate) code: u32,
    pub(crate) msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) details: String,
}

impl CniError {
    pub(crate) fn new(code: Code, msg: impl Into<String>) -> CniError {
        CniError { code: code as u32, msg: msg.into(), details: String::new() }
    }
}

impl From<ClientError> for CniError {
    fn from(error: ClientError) -> CniError {
        let code = match &error {
            ClientError::Connect { .. } | ClientError::Io(_) => Code::TryAgain,
            ClientError::Protocol(_) => Code::Decode,
            ClientError::Refused(ApiError { code: ErrorCode::Invalid | ErrorCode::NotFound, .. }) => {
                Code::InvalidConfig
            }
            ClientError::Refused(ApiError { code: ErrorCode::Unavailable, .. }) => Code::TryAgain,
            ClientError::Refused(_) => Code::Refused,
        };
        CniError::new(code, error.to_string())
    }
}

impl From<LinkError> for CniError {
    fn from(error: LinkError) -> CniError {
        let code = match &error {
            LinkError::Netns { .. } => Code::UnknownContainer,
            LinkError::Open(_) | LinkError::Refused { .. } | LinkError::Taken { .. } => Code::Refused,
        };
        CniError::new(code, error.to_string())
    }
}

impl From<PlugError> for CniError {
    fn from(error: PlugError) -> CniError {
        match error {
            PlugError::Link(error) => error.into(),
            PlugError::Daemon(error) => error.into(),
            PlugError::Exists(_) => CniError::new(Code::Exists, error.to_string()),
            PlugError::RouteExists(_) => CniError::new(Code::Refused, error.to_string()),
            PlugError::Ifname(_) => CniError::new(Code::InvalidEnvironment, error.to_string()),
            PlugError::Mac(_) | PlugError::Mtu(_) => CniError::new(Code::InvalidConfig, error.to_string()),
            PlugError::OwnNamespace(_) => CniError::new(Code::InvalidEnvironment, error.to_string()),
        }
    }
}
