//! Threads kept awake through a run of small parallel regions.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rayon::Yield;

/// Looks for work in a row that find none before a thread goes to sleep: about a millisecond.
const IDLE: u32 = 1 << 14;

/// Looks between two offers of the processor to other programs.
const PATIENCE: u32 = 64;

/// Runs `f` while the other threads of rayon's pool look for its work without pause: waking a thread that sleeps takes longer than
/// a product with one row. A thread that finds nothing for a millisecond sleeps after all.
///
/// Where the caller is not a thread of the pool (see `rayon::ThreadPoolBuilder::use_current_thread`), `f` just runs: its regions
/// would each hand their work over and sleep until it is done, however awake the others are.
pub fn awake<R>(f: impl FnOnce() -> R) -> R {
    let Some(caller) = rayon::current_thread_index() else { return f() };
    let over = AtomicBool::new(false);
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, thread| {
            if thread.index() != caller {
                look_for_work(&over);
            }
        });
        let _over = SetOnDrop(&over);
        f()
    })
}

fn look_for_work(over: &AtomicBool) {
    let mut idle = 0;
    while idle < IDLE && !over.load(Relaxed) {
        if rayon::yield_now() == Some(Yield::Executed) {
            idle = 0;
            continue;
        }
        idle += 1;
        match idle % PATIENCE {
            0 => std::thread::yield_now(),
            _ => std::hint::spin_loop(),
        }
    }
}

/// Also when `f` panics: the scope waits for the threads that look at it.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rayon::prelude::*;

    use super::*;

    fn sum() -> usize {
        awake(|| (0..100).map(|i| (0..64usize).into_par_iter().map(|j| i * j).sum::<usize>()).sum())
    }

    #[test]
    fn regions_inside_give_what_they_give() {
        let want = 99 * 100 / 2 * (63 * 64 / 2);
        assert_eq!(sum(), want, "outside of a pool");
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(sum), want, "{threads} threads");
            assert_eq!(pool.install(|| awake(sum)), want, "one in the other");
        }
    }

    #[test]
    fn a_panic_comes_through() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let fails = || pool.install(|| awake(|| panic!("of f")));
        assert!(catch_unwind(AssertUnwindSafe(fails)).is_err());
        assert_eq!(pool.install(|| awake(|| 7)), 7);
    }

    #[test]
    fn threads_without_work_leave() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let over = AtomicBool::new(false);
        // Never set: it comes back because nothing is there to do.
        pool.install(|| look_for_work(&over));
    }
}
