//! Errors of the control protocol.

use serde::{Deserialize, Serialize};

/// What kind of error, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The line is no request of this protocol version.
    BadRequest,
    /// A value is not allowed.
    Invalid,
    /// What is named does not exist.
    NotFound,
    /// What is to be added exists, or contradicts what exists.
    Conflict,
    /// No address, port number or memory is left.
    Exhausted,
    /// The kernel refused.
    System,
    /// The daemon cannot answer now.
    Unavailable,
}

/// An error: a code for programs and one sentence, with the remedy, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The code.
    pub code: ErrorCode,
    /// The sentence.
    pub message: String,
}

impl ApiError {
    /// An error with a sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into() }
    }
}

/// An error and its causes as one sentence; a cause that the sentence tells already is not told twice.
pub fn sentence(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
