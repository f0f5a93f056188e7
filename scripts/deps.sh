#!/usr/bin/env bash
# Installs what building and testing need and is not there yet: Debian packages, and cargo-nextest.
# Changes nothing when everything is present.
set -euo pipefail

packages=(
    build-essential pkg-config clang libclang-dev   # bindgen and the DPDK shim
    libdpdk-dev dpdk-dev                            # DPDK itself; dpdk-testpmd, the second kind of client in tests
    qemu-system-x86                                 # guests
    busybox-static cpio                             # their initramfs
    zstd xz-utils gzip dpkg                         # their kernel
    iproute2 ethtool coreutils                      # namespaces
    libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients # live migration as clouds do it
    nftables kmod                                   # the kernel's firewall, which Ferry's is compared with
)

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else
        echo "deps: '$*' needs root" >&2
        return 1
    fi
}

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done

# Guests boot Debian's cloud kernel: apt must know it, though it is not installed here.
known() { [[ $(apt-cache policy "$1" 2>/dev/null) =~ Candidate:\ [^\(] ]]; }
stale=no
for package in ${missing[@]+"${missing[@]}"} linux-image-cloud-amd64; do
    known "$package" || stale=yes
done
if [ "$stale" = yes ]; then
    echo "deps: fetching apt's package lists"
    as_root apt-get update --quiet
fi

if [ ${#missing[@]} -gt 0 ]; then
    echo "deps: installing ${missing[*]}"
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "${missing[@]}"; then
        # Package lists that are older than the archive name versions that are gone.
        as_root apt-get update --quiet
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "${missing[@]}"
    fi
else
    echo "deps: all Debian packages are there"
fi

if cargo nextest --version >/dev/null 2>&1; then
    echo "deps: cargo-nextest is there"
else
    echo "deps: installing cargo-nextest"
    # Without it the tests run under cargo test.
    cargo install --locked --quiet cargo-nextest || echo "deps: cargo-nextest could not be installed: tests will run under cargo test" >&2
fi
