//! Finds libdpdk by pkg-config, compiles the shim with DPDK's own compiler flags and generates the bindings.
use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

const ADVICE: &str = "install DPDK's development files: apt-get install libdpdk-dev libclang-dev pkg-config";
/// Functions called as they are. Anything else of DPDK stays invisible.
const FUNCTIONS: &[&str] = &[
    "ferry_.*",
    "rte_bus_name",
    "rte_dev_bus",
    "rte_dev_name",
    "rte_dev_probe",
    "rte_eal_hotplug_remove",
    "rte_eal_init",
    "rte_eth_dev_close",
    "rte_eth_dev_configure",
    "rte_eth_dev_count_avail",
    "rte_eth_dev_get_mtu",
    "rte_eth_dev_get_name_by_port",
    "rte_eth_dev_info_get",
    "rte_eth_dev_rx_intr_ctl_q_get_fd",
    "rte_eth_dev_rx_intr_disable",
    "rte_eth_dev_rx_intr_enable",
    "rte_eth_dev_set_mtu",
    "rte_eth_dev_socket_id",
    "rte_eth_dev_start",
    "rte_eth_dev_stop",
    "rte_eth_find_next",
    "rte_eth_link_get_nowait",
    "rte_eth_macaddr_get",
    "rte_eth_promiscuous_(enable|disable|get)",
    "rte_eth_rx_queue_setup",
    "rte_eth_stats_get",
    "rte_eth_tx_queue_setup",
    "rte_eth_xstats_get",
    "rte_eth_xstats_get_names",
    "rte_log_set_global_level",
    "rte_log_set_level_pattern",
    "rte_mempool_avail_count",
    "rte_mempool_free",
    "rte_mempool_in_use_count",
    "rte_pktmbuf_free",
    "rte_pktmbuf_pool_create_by_ops",
    "rte_strerror",
    "rte_thread_register",
    "rte_thread_unregister",
    "rte_version",
];
const VARIABLES: &[&str] =
    &["FERRY_.*", "RTE_ETH_NAME_MAX_LEN", "RTE_ETH_XSTATS_NAME_SIZE", "RTE_MAX_ETHPORTS", "RTE_PKTMBUF_HEADROOM"];
/// Types only ever held by pointer: their layout is DPDK's business.
const OPAQUE: &[&str] = &["rte_mbuf", "rte_mempool", "rte_device", "rte_bus", "rte_eth_dev", "rte_eth_dev_data"];

fn give_up(what: &str) -> ! {
    eprintln!("\nerror: {what}\nhelp: {ADVICE}\n");
    exit(1);
}

fn main() {
    for file in ["build.rs", "wrapper.h", "shim.h", "shim.c"] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");

    let dpdk = pkg_config::Config::new()
        .atleast_version("22.11")
        .probe("libdpdk")
        .unwrap_or_else(|e| give_up(&format!("libdpdk (22.11 or newer) was not found by pkg-config: {e}")));
    // The pkg-config crate reports include paths and defines, not machine flags: ask for all of them.
    let cflags = Command::new(env::var_os("PKG_CONFIG").unwrap_or_else(|| "pkg-config".into()))
        .args(["--cflags", "libdpdk"])
        .output()
        .unwrap_or_else(|e| give_up(&format!("pkg-config does not run: {e}")));
    let cflags = String::from_utf8_lossy(&cflags.stdout).into_owned();
    let cflags: Vec<&str> = cflags.split_whitespace().collect();

    let mut shim = cc::Build::new();
    shim.file("shim.c").warnings(true).extra_warnings(true).flag("-O2").flag("-std=gnu11");
    for flag in &cflags {
        // -isystem, so that our warnings do not apply to DPDK's headers.
        match flag.strip_prefix("-I") {
            Some(path) => shim.flag("-isystem").flag(path),
            None => shim.flag(flag),
        };
    }
    // DPDK marks what it may still change as experimental; Debian's library exports it all the same.
    shim.define("ALLOW_EXPERIMENTAL_API", None);
    shim.compile("ferry_dpdk_shim");

    // Link order: the shim (above) needs these. Unused ones are dropped by the linker's --as-needed.
    for path in &dpdk.link_paths {
        println!("cargo:rustc-link-search=native={}", path.display());
    }

    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(&cflags)
        .clang_arg("-DALLOW_EXPERIMENTAL_API")
        .use_core()
        .generate_comments(false)
        .derive_default(true)
        .prepend_enum_name(false)
        .allowlist_recursively(true)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    for f in FUNCTIONS {
        builder = builder.allowlist_function(f);
    }
    for v in VARIABLES {
        builder = builder.allowlist_var(v);
    }
    for t in OPAQUE {
        builder = builder.opaque_type(t);
    }
    let bindings = builder
        .generate()
        .unwrap_or_else(|e| give_up(&format!("bindgen could not read DPDK's headers (is libclang there?): {e}")));
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("bindings.rs");
    if let Err(e) = bindings.write_to_file(&out) {
        give_up(&format!("{}: {e}", out.display()));
    }
}
