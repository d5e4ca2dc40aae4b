//! Threads that share one operation's outputs.
//!
//! Invariants:
//! - An operation is cut into chunks of whole output elements, dealt by a counter to whichever thread is free. Who takes
//!   which chunk never reaches a bit, and a thread that the machine slows down takes fewer.
//! - The caller works too. Small operations, and those that find the workers busy with another caller's, run on the
//!   caller alone, so callers never wait for each other.
//! - Idle workers sleep. Nothing spins for longer than [`SPINS`]: the operations of a forward pass follow each other within
//!   microseconds, and waking a sleeper takes tens of them.
//! - A worker whose floating-point environment would change bits takes no chunk.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::environment::float_environment_ok;
use crate::path::Path;

/// More threads than this are not started.
const THREADS_MAX: usize = 256;

/// Operations of fewer multiply-adds (or their like) run on the caller: waking a worker costs about as much.
const SHARED_COST_MIN: usize = 1 << 20;

/// A chunk is at least this many multiply-adds, so that dealing chunks costs nothing in comparison.
const CHUNK_COST_MIN: usize = 1 << 15;

/// Chunks for each thread, where an operation is large enough: the more, the less the slowest thread is waited for.
const CHUNKS_PER_THREAD: usize = 8;

/// Looks at what another thread is about to do before one sleeps until it has: 20 to 50 microseconds, as long as it takes
/// to fall asleep and be woken.
const SPINS: usize = 1000;

/// Threads that compute together, and the [`Path`] they compute with. Dropping it ends its threads.
///
/// Shareable: several threads may compute with one pool at once.
pub struct Pool {
    path: Path,
    shared: Arc<Shared>,
    /// Held by the caller whose operation the workers share.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    board: Mutex<Board>,
    /// A job was posted, or the pool ends.
    posted: Condvar,
    /// No worker holds the job any more.
    left: Condvar,
    /// Grows with each job, so that a worker enters each at most once. Written by who holds the board.
    number: AtomicU64,
    /// Workers that hold the pointer to the current job. Written by who holds the board.
    inside: AtomicUsize,
    environment_fault: AtomicBool,
}

/// What workers read when they wake.
struct Board {
    job: Option<JobPointer>,
    /// Workers that wait for [`Shared::posted`].
    sleeping: usize,
    /// True if the caller waits for [`Shared::left`].
    awaited: bool,
    ending: bool,
}

/// An operation being shared, on its caller's stack.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    chunks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

// SAFETY: the pointee is `Sync` (its work is, and the rest are atomics and locks), and `Posting` keeps it alive until
// every worker that copied the pointer has said that it left.
unsafe impl Send for JobPointer {}

impl Pool {
    /// A pool of `threads` threads, the caller of an operation included: `threads - 1` are started, at most 255, or
    /// fewer if the system refuses. With 0 or 1 everything runs on the caller.
    pub fn new(threads: usize, path: Path) -> Pool {
        let shared = Arc::new(Shared {
            board: Mutex::new(Board { job: None, sleeping: 0, awaited: false, ending: false }),
            posted: Condvar::new(),
            left: Condvar::new(),
            number: AtomicU64::new(0),
            inside: AtomicUsize::new(0),
            environment_fault: AtomicBool::new(false),
        });
        let workers = (1..threads.min(THREADS_MAX))
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernels-{index}")).spawn(move || shared.serve()).ok()
            })
            .collect();
        Pool { path, shared, turn: Mutex::new(()), workers }
    }

    /// The instructions this pool computes with.
    pub fn path(&self) -> Path {
        self.path
    }

    /// Threads that share an operation, its caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// True if the calling thread's floating-point environment keeps the profile
    /// ([`float_environment_ok`](crate::float_environment_ok)), and every worker's did whenever it was asked to work. A
    /// worker that fails the test computes nothing, so what the pool returned is right if the caller's environment was;
    /// but a library that tampers with environments is loaded, and the node should not go on.
    pub fn float_environment_ok(&self) -> bool {
        float_environment_ok() && !self.shared.environment_fault.load(Ordering::Relaxed)
    }

    /// Calls `work` on ranges that together cover `0..items` once each, on all threads where the cost is worth it.
    /// Ranges start at multiples of `granularity`. `cost` is that of one item, in multiply-adds.
    pub(crate) fn split(&self, items: usize, granularity: usize, cost: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
        let total = items.saturating_mul(cost);
        if self.workers.is_empty() || total < SHARED_COST_MIN {
            return work(0..items);
        }
        let chunk = items
            .div_ceil(self.threads() * CHUNKS_PER_THREAD)
            .max(CHUNK_COST_MIN.div_ceil(cost.max(1)))
            .next_multiple_of(granularity);
        let ranged = |index: usize| work(index * chunk..((index + 1) * chunk).min(items));
        self.share(items.div_ceil(chunk), &ranged);
    }

    /// Calls `work` with the first row's index and the rows of each of several ranges of `out`, which is rows of `width`
    /// numbers. `cost` is that of one row.
    pub(crate) fn split_rows(
        &self,
        out: &mut [f32],
        width: usize,
        cost: usize,
        work: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let rows = out.len() / width;
        let out = Disjoint::new(out);
        self.split(rows, 1, cost, &|range: Range<usize>| {
            let first = range.start;
            // SAFETY: `split` gives out each row once, so no two parts overlap.
            let part = unsafe { out.part(range.start * width..range.end * width) };
            work(first, part);
        });
    }

    /// Calls `work` once with each index below `chunks`.
    fn share(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        // The lock guards no data, so a poisoned one is as good.
        let turn = match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        if turn.is_none() || chunks < 2 {
            return (0..chunks).for_each(work);
        }
        let job = Job { work, chunks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        let posting = Posting::new(&self.shared, &job, self.workers.len());
        job.run();
        drop(posting);
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.board().ending = true;
        self.shared.posted.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its work, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pool").field("path", &self.path).field("threads", &self.threads()).finish()
    }
}

impl Job<'_> {
    /// Takes chunks until none is left.
    fn run(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.chunks {
                return;
            }
            (self.work)(index);
        }
    }
}

/// A job that workers can see. Dropping it takes the job down and waits for the workers inside, so the job cannot
/// outlive its borrows even when the caller's own chunk panics.
struct Posting<'a> {
    shared: &'a Shared,
}

impl<'a> Posting<'a> {
    fn new(shared: &'a Shared, job: &Job<'_>, workers: usize) -> Posting<'a> {
        let pointer = std::ptr::from_ref(job).cast::<Job<'static>>();
        let mut board = shared.board();
        board.job = Some(JobPointer(pointer));
        shared.number.fetch_add(1, Ordering::Relaxed);
        let sleeping = board.sleeping;
        drop(board);
        // The caller takes a chunk as well. No more workers need to wake than there are others.
        if sleeping > 0 && job.chunks > workers {
            shared.posted.notify_all();
        } else {
            (1..job.chunks.min(sleeping + 1)).for_each(|_| shared.posted.notify_one());
        }
        Posting { shared }
    }
}

impl Drop for Posting<'_> {
    fn drop(&mut self) {
        let inside = || self.shared.inside.load(Ordering::Relaxed) > 0;
        self.shared.board().job = None;
        spin_while(inside);
        let mut board = self.shared.board();
        while inside() {
            board.awaited = true;
            board = self.shared.left.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        board.awaited = false;
    }
}

impl Shared {
    /// Nothing panics while it holds this lock, so a poisoned board is consistent.
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a worker.
    fn serve(&self) {
        let mut done = 0;
        while let Some(pointer) = self.enter(&mut done) {
            if float_environment_ok() {
                // SAFETY: `enter` counted this worker inside while the job was posted. Its `Posting` cannot finish
                // dropping before `leave` below, and the job lives at least as long as its posting.
                let job = unsafe { &*pointer.0 };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.run())) {
                    // Leave no chunk to anyone: the operation fails as a whole.
                    job.next.store(job.chunks, Ordering::Relaxed);
                    let mut slot = job.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    slot.get_or_insert(panic);
                }
            } else {
                self.environment_fault.store(true, Ordering::Relaxed);
            }
            self.leave();
        }
    }

    /// Waits until there is a job that this worker has not seen, and enters it. `None` when the pool ends.
    fn enter(&self, done: &mut u64) -> Option<JobPointer> {
        spin_while(|| self.number.load(Ordering::Relaxed) == *done);
        let mut board = self.board();
        loop {
            if board.ending {
                return None;
            }
            // A job that was taken down before this worker came is as good as seen.
            let number = self.number.load(Ordering::Relaxed);
            let is_new = number != *done;
            *done = number;
            if let Some(job) = board.job
                && is_new
            {
                self.inside.fetch_add(1, Ordering::Relaxed);
                return Some(job);
            }
            board.sleeping += 1;
            board = self.posted.wait(board).unwrap_or_else(PoisonError::into_inner);
            board.sleeping -= 1;
        }
    }

    fn leave(&self) {
        let board = self.board();
        if self.inside.fetch_sub(1, Ordering::Relaxed) == 1 && board.awaited {
            self.left.notify_all();
        }
    }
}

/// Returns when the answer is no, or when it has been asked [`SPINS`] times.
fn spin_while(asked: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if !asked() {
            return;
        }
        std::hint::spin_loop();
    }
}

/// A slice whose parts are given out to several threads.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow of things that may move between threads, and the contract of `part` keeps the parts
// that threads hold apart.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Disjoint<'a, T> {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    ///
    /// # Panics
    /// If the range is not inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the assertion keeps the offset inside the slice.
        let start = unsafe { self.start.add(range.start) };
        // SAFETY: the range lies inside the slice, which `self` borrows exclusively, and the caller promises that no
        // other living part overlaps it.
        unsafe { std::slice::from_raw_parts_mut(start, range.end - range.start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cost that makes any operation worth sharing.
    const LARGE: usize = SHARED_COST_MIN;

    #[test]
    fn every_item_is_dealt_once() {
        for threads in 0..5 {
            let pool = Pool::new(threads, Path::Scalar);
            for items in [0, 1, 2, 7, 64, 1001] {
                for granularity in [1, 4] {
                    for cost in [1, 100, LARGE] {
                        let dealt: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                        pool.split(items, granularity, cost, &|range| {
                            assert_eq!(range.start % granularity, 0);
                            for item in range {
                                dealt[item].fetch_add(1, Ordering::Relaxed);
                            }
                        });
                        assert!(dealt.iter().all(|times| times.load(Ordering::Relaxed) == 1));
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_dealt_whole() {
        let pool = Pool::new(3, Path::Scalar);
        let mut out = vec![0.0; 3 * 500];
        pool.split_rows(&mut out, 3, LARGE, &|first, part| {
            for (row, numbers) in part.chunks_exact_mut(3).enumerate() {
                numbers.fill((first + row) as f32);
            }
        });
        for (row, numbers) in out.chunks_exact(3).enumerate() {
            assert_eq!(numbers, [row as f32; 3]);
        }
    }

    #[test]
    fn a_panic_in_any_chunk_reaches_the_caller_and_spares_the_pool() {
        let pool = Pool::new(3, Path::Scalar);
        for bad in 0..100 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.split(100, 1, LARGE, &|range| assert!(!range.contains(&bad)));
            }));
            assert!(outcome.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.split(100, 1, LARGE, &|range| {
            count.fetch_add(range.len(), Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 100);
    }

    #[test]
    fn callers_share_a_pool_and_may_nest() {
        let pool = Pool::new(3, Path::Scalar);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.split(8, 1, LARGE, &|outer| {
                            pool.split(2 * outer.len(), 1, LARGE, &|inner| {
                                count.fetch_add(inner.len(), Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 16);
    }

    #[test]
    fn a_worker_takes_part() {
        let pool = Pool::new(2, Path::Scalar);
        let caller = std::thread::current().id();
        let (helped, waiting) = (Mutex::new(false), Condvar::new());
        pool.split(2, 1, LARGE, &|_| {
            let mut helped = helped.lock().unwrap();
            if std::thread::current().id() == caller {
                while !*helped {
                    helped = waiting.wait(helped).unwrap();
                }
            } else {
                *helped = true;
                waiting.notify_all();
            }
        });
        assert!(helped.into_inner().unwrap());
        assert!(pool.float_environment_ok());
    }
}
