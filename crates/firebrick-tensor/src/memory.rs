//! Memory that is freed, in programs whose global allocator is mimalloc.

use std::ffi::c_long;

use libmimalloc_sys::{mi_collect, mi_option_set, mi_option_t};

/// `mi_option_purge_delay` of mimalloc.h, in milliseconds.
const PURGE_DELAY: mi_option_t = 15;
const AT_FIRST: c_long = 1000;
/// Longer than programs run; without an end, what is freed would not even be noted for [`keep_freed`]`(false)`.
const KEPT: c_long = 100_000_000;

/// Keeps freed memory for what is allocated next, or gives it back to the operating system now and soon after it is freed, as at first.
///
/// A training step asks for the buffers again that the one before it freed; kept, they cost no page faults. The process then stays as
/// large as it ever was.
pub fn keep_freed(keep: bool) {
    // SAFETY: the option is a number that mimalloc reads atomically; collecting is allowed on every thread at any time.
    unsafe {
        mi_option_set(PURGE_DELAY, if keep { KEPT } else { AT_FIRST });
        if !keep {
            mi_collect(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_one_that_mimalloc_purges_by() {
        // SAFETY: reads the number.
        let delay = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        assert_eq!(delay(), AT_FIRST, "another option stands at this place");
        keep_freed(true);
        assert_eq!(delay(), KEPT);
        keep_freed(false);
        assert_eq!(delay(), AT_FIRST);
    }
}
