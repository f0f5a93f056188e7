//! What the test guest's agent and the test harness agree on: the command protocol, and the pseudo-random
//! streams whose content both sides can compute on their own.
pub mod protocol;
pub mod stream;
