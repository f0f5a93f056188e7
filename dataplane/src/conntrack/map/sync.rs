//! The atomics of the map's protocol: the model checker's when it runs, the machine's otherwise.
#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(all(loom, test))]
pub(super) use checked::EVERY_ACCESS;
#[cfg(loom)]
pub(super) use checked::{AtomicBool, AtomicU32, AtomicU64};
#[cfg(loom)]
pub(super) use loom::sync::atomic::{Ordering, fence};

/// Tells the processor, or the model checker, that another thread has to move first.
#[inline]
pub(super) fn spin() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    core::hint::spin_loop();
}

/// Between a sequentially consistent exchange and such a load, which need nothing more to stay in this order, not even when all else that
/// others do is fences and weaker accesses (C++20, [atomics.order] 4). The model checker knows no such accesses and takes them for weaker
/// ones, but it knows the fence.
#[inline(always)]
pub(super) fn after_exchange() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// The model checker's atomics with a switch.
///
/// To decide which executions differ, the checker compares an access with the last one to the same atomic only; a load before a thread's
/// own load and store is forgotten, and executions with it. With [`EVERY_ACCESS`] each access is preceded by a relaxed read-modify-write
/// of a companion, which never commutes, so that every order of accesses is tried. But together with fences that orders more than the
/// program does. So models are checked both ways: with it for all interleavings, without it for all that the memory model allows.
#[cfg(loom)]
mod checked {
    use core::cell::Cell;

    use loom::sync::atomic::Ordering;

    std::thread_local! {
        /// The checker runs all threads of a model on one.
        pub(in super::super) static EVERY_ACCESS: Cell<bool> = const { Cell::new(false) };
    }

    macro_rules! checked {
        ($name:ident, $value:ty) => {
            #[derive(Default)]
            pub(in super::super) struct $name(loom::sync::atomic::$name, loom::sync::atomic::AtomicU32);

            #[allow(dead_code)] // Not all have all.
            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value), loom::sync::atomic::AtomicU32::new(0))
                }

                fn inner(&self) -> &loom::sync::atomic::$name {
                    if EVERY_ACCESS.get() {
                        self.1.fetch_add(1, Ordering::Relaxed);
                    }
                    &self.0
                }

                pub fn load(&self, order: Ordering) -> $value {
                    self.inner().load(order)
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    self.inner().store(value, order);
                }

                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    self.inner().swap(value, order)
                }

                pub fn compare_exchange(
                    &self,
                    from: $value,
                    to: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.inner().compare_exchange(from, to, success, failure)
                }

                pub fn compare_exchange_weak(
                    &self,
                    from: $value,
                    to: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(from, to, success, failure)
                }

                pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                    self.inner().fetch_or(value, order)
                }

                pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                    self.inner().fetch_and(value, order)
                }
            }
        };
    }

    checked!(AtomicBool, bool);
    checked!(AtomicU32, u32);
    checked!(AtomicU64, u64);

    impl AtomicU32 {
        pub fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
            self.inner().fetch_add(value, order)
        }
    }

    impl AtomicU64 {
        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            self.inner().fetch_add(value, order)
        }
    }
}
