//! Threads kept awake through a run of small parallel regions, and the regions that they share.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use rayon::Yield;
use rayon::prelude::*;

/// Looks for work in a row that find none before a thread goes to sleep: some 16 milliseconds.
const IDLE: u32 = 1 << 18;

/// Looks between two at what else the pool has to do, and between two offers of the processor to other programs.
const PATIENCE: u32 = 64;

thread_local! {
    /// The threads that this one keeps awake.
    static TEAM: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Runs `f` while the other threads of rayon's pool look for its work without pause: waking a thread that sleeps takes longer than
/// a product with one row, and a pass of a model has hundreds of regions. A thread that finds nothing for some 16 milliseconds sleeps
/// after all.
///
/// On a GPU `f` just runs, and where the caller is not a thread of the pool (see `rayon::ThreadPoolBuilder::use_current_thread`): its
/// regions would each hand their work over and sleep until it is done, however awake the others are.
pub fn awake<R>(device: &Device, f: impl FnOnce() -> R) -> R {
    let Some(caller) = rayon::current_thread_index() else { return f() };
    if *device != Device::flex() || TEAM.with_borrow(Option::is_some) {
        return f();
    }
    let team = Arc::new(Team { others: rayon::current_num_threads() - 1, ..Team::default() });
    rayon::in_place_scope(|scope| {
        let others = team.clone();
        scope.spawn_broadcast(move |_, thread| {
            if thread.index() != caller {
                others.look_for_work();
            }
        });
        TEAM.set(Some(team.clone()));
        let _over = Dismiss(&team);
        f()
    })
}

/// `f(number, part)` for parts of `size` elements of `data`, in parallel.
pub(super) fn parts<T: Send>(data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    // A part may have regions of its own, which are rayon's.
    let Some(team) = TEAM.take().filter(|team| team.asleep.load(Relaxed) < team.others) else {
        return data.par_chunks_mut(size).enumerate().for_each(|(i, part)| f(i, part));
    };
    let (len, start) = (data.len(), Start(data.as_mut_ptr()));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        team.run(len.div_ceil(size), &|i| {
            // SAFETY: part `i` begins inside `data` and ends at its end at most; `run` passes each `i` once, so that nobody else has it.
            let part =
                unsafe { std::slice::from_raw_parts_mut(start.at(i * size), size.min(len - i * size)) };
            f(i, part);
        });
    }));
    TEAM.set(Some(team));
    outcome.unwrap_or_else(|panic| resume_unwind(panic));
}

/// `f(task)` for each of `tasks`, in parallel.
pub(super) fn each<T: Send>(mut tasks: Vec<T>, f: impl Fn(&mut T) + Sync) {
    parts(&mut tasks, 1, |_, task| f(&mut task[0]));
}

/// Where elements begin that tasks share out among themselves.
pub(super) struct Start<T>(pub(super) *mut T);

// SAFETY: who reads or writes through it gives each element that changes to one thread.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    /// Where element `i` is, one of those there are.
    pub(super) fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// Threads that take parts of a region from a counter. Nobody waits for a thread that has not come: the caller does what others leave.
#[derive(Default)]
struct Team {
    /// The region under way, if one is.
    region: AtomicPtr<Region<'static>>,
    /// Threads that may have a region in hand, but for the caller.
    inside: AtomicUsize,
    /// Regions begun so far.
    begun: AtomicUsize,
    over: AtomicBool,
    /// Threads of the pool but for the caller, and how many of them have found nothing for too long.
    others: usize,
    asleep: AtomicUsize,
}

struct Region<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Region<'_> {
    /// Runs tasks that nobody has taken until there are none.
    fn work(&self) {
        let tasks = || {
            loop {
                let i = self.next.fetch_add(1, Relaxed);
                if i >= self.tasks {
                    break;
                }
                (self.task)(i);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(tasks)) {
            self.next.store(self.tasks, Relaxed);
            *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
        }
    }
}

impl Team {
    /// Runs `task(i)` for each `i` below `tasks` once and waits for all; one region at a time.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let region = Region { task, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        self.region.store(ptr::from_ref(&region).cast_mut().cast(), SeqCst);
        self.begun.fetch_add(1, Relaxed);
        region.work();
        self.region.store(ptr::null_mut(), SeqCst);
        // Who comes from here on sees no region; who came before is counted, and may need this thread for a run of its own.
        let mut looks = 0u32;
        while self.inside.load(SeqCst) > 0 {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(PATIENCE) {
                rayon::yield_now();
            }
            pause(looks);
        }
        if let Some(panic) = region.panic.into_inner().unwrap_or_else(|e| e.into_inner()) {
            resume_unwind(panic);
        }
    }

    /// Helps with the region under way; whether there is one that `seen`, the number of the last one, does not count.
    fn help(&self, seen: &mut usize) -> bool {
        let begun = self.begun.load(Relaxed);
        if begun == *seen {
            return false;
        }
        *seen = begun;
        self.inside.fetch_add(1, SeqCst);
        let region = self.region.load(SeqCst);
        if !region.is_null() {
            // SAFETY: `run` keeps the region until it has taken its address away and then found nobody inside. This thread went inside
            // before it read the address, so `run` waits for it.
            unsafe { &*region }.work();
        }
        self.inside.fetch_sub(1, SeqCst);
        !region.is_null()
    }

    fn look_for_work(&self) {
        let (mut idle, mut seen) = (0, 0);
        while idle < IDLE && !self.over.load(Relaxed) {
            let found =
                self.help(&mut seen) || idle % PATIENCE == 0 && rayon::yield_now() == Some(Yield::Executed);
            if found {
                idle = 1;
                continue;
            }
            idle += 1;
            pause(idle);
        }
        self.asleep.fetch_add(1, Relaxed);
    }
}

/// What a thread does between two looks.
fn pause(looks: u32) {
    match looks % PATIENCE {
        0 => std::thread::yield_now(),
        _ => std::hint::spin_loop(),
    }
}

/// Also when `f` panics: the scope waits for the threads that look at it.
struct Dismiss<'a>(&'a Team);

impl Drop for Dismiss<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Relaxed);
        TEAM.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awake<R>(f: impl FnOnce() -> R) -> R {
        super::awake(&Device::flex(), f)
    }

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

    /// Square roots of the numbers below 1000, part by part, and how many regions in a row got each right.
    fn regions(count: usize) -> usize {
        let right = |_: &usize| {
            let mut roots = vec![0.0; 1000];
            parts(&mut roots, 7, |i, part| {
                for (j, root) in part.iter_mut().enumerate() {
                    *root += ((7 * i + j) as f64).sqrt();
                }
            });
            roots.iter().enumerate().all(|(i, root)| *root == (i as f64).sqrt())
        };
        (0..count).filter(right).count()
    }

    #[test]
    fn each_part_is_computed_once() {
        assert_eq!(regions(3), 3, "outside of a pool");
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| regions(10)), 10, "{threads} threads that sleep");
            assert_eq!(pool.install(|| awake(|| regions(3000))), 3000, "{threads} threads");
            let nested = || {
                let mut right = [0; 4];
                parts(&mut right, 1, |_, right| right[0] = awake(|| regions(50)));
                right
            };
            assert_eq!(pool.install(|| awake(nested)), [50; 4], "regions in a region");
        }
        awake(|| parts::<f32>(&mut [], 3, |_, _| panic!("no part")));
    }

    #[test]
    fn a_panic_in_a_part_comes_through_and_ends_nothing_else() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let fails = |at: usize| {
            parts(&mut [0u8; 100], 1, |i, _| assert_ne!(i, at, "of a part"));
        };
        pool.install(|| {
            awake(|| {
                for at in 0..100 {
                    assert!(catch_unwind(AssertUnwindSafe(|| fails(at))).is_err());
                }
                assert_eq!(regions(3), 3);
            });
        });
    }

    #[test]
    fn threads_without_work_leave() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        // Never dismissed: it comes back because nothing is there to do.
        pool.install(|| Team::default().look_for_work());
    }
}
