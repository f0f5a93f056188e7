//! Errors as the API reports them: `{"error": {"code", "message", "hint", "details"}}`.
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::core::ChangeError;
use crate::engine::EngineError;

/// Body of an error response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// An error.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// What kind, for programs: `bad_request`, `not_found`, `method_not_allowed`, `too_large`, `exists`, `conflict`,
    /// `invalid`, `failed`, `timeout`, `internal`.
    pub code: String,
    /// What is wrong, for people.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub hint: String,
    /// Every single problem, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// An error response.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is in the body.
    pub detail: ErrorDetail,
}

impl ApiError {
    /// An error with the given parts.
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let detail = ErrorDetail { code: code.into(), message: message.into(), hint: hint.into(), details: Vec::new() };
        Self { status, detail }
    }

    /// A malformed request.
    pub fn bad_request(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message, hint)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, axum::Json(ErrorBody { error: self.detail })).into_response()
    }
}

impl From<ChangeError> for ApiError {
    fn from(e: ChangeError) -> Self {
        let (status, code) = match &e {
            ChangeError::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid"),
            ChangeError::NotFound { .. } => (StatusCode::NOT_FOUND, "not_found"),
            ChangeError::Exists { .. } => (StatusCode::CONFLICT, "exists"),
            ChangeError::Conflict { .. } => (StatusCode::CONFLICT, "conflict"),
            ChangeError::Failed { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        let mut out = Self::new(status, code, e.to_string(), e.hint());
        if let ChangeError::Invalid(config) = &e
            && config.problems.len() > 1
        {
            out.detail.message = format!("{} problems, first: {}", config.problems.len(), config.messages()[0]);
            out.detail.details = config.messages();
        }
        out
    }
}

impl From<EngineError> for ApiError {
    fn from(e: EngineError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", e.message, e.hint)
    }
}
