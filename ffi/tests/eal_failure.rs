//! An EAL that cannot start says why, and does not take the process with it. Its own binary: it can fail only once.
use ferry_ffi::eal::{Eal, EalConfig, EalError, Memory};

#[test]
fn a_failed_start_says_why_and_stays_failed() {
    // Found before EAL sees it: may be corrected.
    let mut config = EalConfig { memory: Memory::NoHuge, memory_mb: 1, ..EalConfig::default() };
    assert!(matches!(Eal::start(&config), Err(EalError::Config(_))));
    config.memory_mb = 64;
    config.extra_args = vec!["--this-is-no-option".into()];
    let e = Eal::start(&config).unwrap_err();
    assert!(matches!(&e, EalError::Init { .. }), "{e:?}");
    assert!(e.to_string().contains("does not start"), "{e}");
    let again = Eal::start(&config).unwrap_err();
    assert!(matches!(&again, EalError::FailedBefore(_)) && again.to_string().contains("restart"), "{again}");
    assert!(Eal::running().is_none());
}
