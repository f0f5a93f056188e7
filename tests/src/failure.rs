//! How tests fail: at once, while everything they started is still there to be asked for its logs.

/// The error type of tests. It is never constructed: converting an error into it, which the `?` operator does, panics on the
/// spot. A test that merely returned the error would drop guests and switch first, and they could not know that it failed.
#[derive(Debug)]
pub enum Failure {}

/// What a test function returns.
pub type Outcome = Result<(), Failure>;

impl From<anyhow::Error> for Failure {
    #[track_caller]
    fn from(e: anyhow::Error) -> Self {
        panic!("{e:#}");
    }
}

impl From<std::io::Error> for Failure {
    #[track_caller]
    fn from(e: std::io::Error) -> Self {
        panic!("{e}");
    }
}
