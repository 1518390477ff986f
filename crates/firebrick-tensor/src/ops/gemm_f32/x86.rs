//! Panels of 64 outputs with AVX-512: transposed for the library, or multiplied here.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use faer::MatRef;
use half::bf16;

use super::super::avx512::{mask, transposed};
use super::{PANEL, Row};

/// Numbers of a vector.
const LANES: usize = 16;

/// Numbers that are f32 once they are transposed.
pub(super) trait Number: Copy {
    fn wide(self) -> f32;

    /// Sixteen from `at` on.
    ///
    /// # Safety
    /// They have to be there.
    unsafe fn sixteen(at: *const Self) -> __m512i;
}

impl Number for f32 {
    fn wide(self) -> f32 {
        self
    }

    /// # Safety
    /// They have to be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn sixteen(at: *const f32) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
}

impl Number for bf16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }

    /// # Safety
    /// They have to be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn sixteen(at: *const bf16) -> __m512i {
        // SAFETY: the caller's.
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(at.cast()) }))
    }
}

/// Writes the rows of `columns`, whose columns are unbroken, at most [`PANEL`] of them; the last vector of a row is filled up with zeros.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose<T: Number>(columns: MatRef<'_, T>, rows: &mut [MaybeUninit<Row>]) {
    let (depth, count) = (columns.nrows(), columns.ncols());
    assert!(rows.len() == depth && count <= PANEL && (columns.row_stride() == 1 || depth == 1));
    let out = rows.as_mut_ptr().cast::<f32>();
    let (whole_depth, whole_count) = (depth / LANES * LANES, count / LANES * LANES);
    for j in (0..whole_count).step_by(LANES) {
        for p in (0..whole_depth).step_by(LANES) {
            // SAFETY: sixteen numbers of sixteen columns, and as many of as many rows, from here on.
            unsafe {
                let from = columns.as_ptr().offset(j as isize * columns.col_stride()).add(p);
                square(from, columns.col_stride(), out.add(p * PANEL + j));
            }
        }
    }
    for j in 0..count.next_multiple_of(LANES) {
        let from = if j < whole_count { whole_depth } else { 0 };
        for p in from..depth {
            let value = if j < count { columns[(p, j)].wide() } else { 0.0 };
            // SAFETY: row `p` is one of `rows`, which has `PANEL` numbers.
            unsafe { out.add(p * PANEL + j).write(value) };
        }
    }
}

/// As [`transpose`], of columns whose rows are unbroken.
#[target_feature(enable = "avx512f")]
fn copy(columns: MatRef<'_, f32>, rows: &mut [MaybeUninit<Row>]) {
    let (depth, count) = (columns.nrows(), columns.ncols());
    assert!(rows.len() == depth && count <= PANEL && (columns.col_stride() == 1 || count == 1));
    let vectors = count.div_ceil(LANES);
    for (p, row) in rows.iter_mut().enumerate() {
        let from = columns.as_ptr().wrapping_offset(p as isize * columns.row_stride());
        let to = row.as_mut_ptr().cast::<f32>();
        for v in 0..vectors {
            // SAFETY: of row `p` this reads columns that there are, and a row of a panel has room for all vectors.
            unsafe {
                let values = _mm512_maskz_loadu_ps(mask(count - v * LANES), from.wrapping_add(v * LANES));
                _mm512_store_ps(to.add(v * LANES), values);
            }
        }
    }
}

/// Sixteen rows of sixteen numbers at `to`, [`PANEL`] apart, of sixteen columns at `from`, `stride` apart.
///
/// # Safety
/// All of both has to be there, and `to` for this thread alone.
#[target_feature(enable = "avx512f")]
unsafe fn square<T: Number>(from: *const T, stride: isize, to: *mut f32) {
    // SAFETY: the caller's.
    let r = std::array::from_fn(|i| unsafe { T::sixteen(from.offset(i as isize * stride)) });
    for (p, row) in transposed(r).into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(to.add(p * PANEL).cast(), row) };
    }
}

/// The lines of a matrix, in runs of [`PANEL`] at most, a step apart.
#[derive(Clone, Copy)]
struct Lines {
    first: *const f32,
    step: isize,
    /// Runs of lines below one another, how far apart they are, and runs in all.
    below: usize,
    down: isize,
    runs: usize,
}

impl Lines {
    const NONE: Lines = Lines { first: std::ptr::null(), step: 0, below: 1, down: 0, runs: 0 };

    fn of(part: MatRef<'_, f32>) -> Self {
        let (first, depth, count) = (part.as_ptr(), part.nrows(), part.ncols());
        if part.col_stride() == 1 {
            let (below, step) = (depth.div_ceil(PANEL), part.row_stride());
            Lines { first, step, below, down: PANEL as isize * step, runs: below * count.div_ceil(LANES) }
        } else {
            let (below, step) = (count.div_ceil(PANEL), part.col_stride());
            Lines { first, step, below, down: PANEL as isize * step, runs: below * depth.div_ceil(LANES) }
        }
    }

    /// Where a run begins.
    fn run(&self, run: usize) -> *const f32 {
        let down = self.down * (run % self.below) as isize;
        self.first.wrapping_offset(down).wrapping_add(LANES * (run / self.below))
    }
}

/// What the tiles of one part of the right matrix ask for meanwhile, so that it is in the second cache afterwards. Lines are asked for at even
/// intervals: few can be on their way at a time, and the left matrix wants some of those.
#[derive(Clone, Copy)]
struct Ahead {
    lines: [Lines; 2],
    /// Columns of the left matrix for each line, a power of two.
    every: usize,
}

impl Ahead {
    /// `slots` are runs of columns of the left matrix.
    fn new(lines: [Lines; 2], slots: usize) -> Self {
        let every = slots / (lines[0].runs + lines[1].runs).max(1);
        Ahead { lines, every: 1 << every.clamp(1, 8).ilog2() }
    }

    /// The first line of a slot, and how far the next one is. Past the last run it is one line over and over.
    #[inline(always)]
    fn slot(&self, slot: usize) -> (*const f32, isize) {
        let (run, part) = (slot / self.every, slot % self.every);
        let [one, other] = &self.lines;
        let (first, step) = if run < one.runs {
            (one.run(run), one.step)
        } else if run < one.runs + other.runs {
            (other.run(run - one.runs), other.step)
        } else {
            return (one.first, 0);
        };
        (first.wrapping_offset(step * (part * PANEL / self.every) as isize), step)
    }
}

/// Rows of a part of the right matrix that is transposed: so many of a panel take two thirds of the first cache.
const DEPTH: usize = 128;

/// Rows of a part that is read as it lies, from the second cache.
pub(super) const DEEP: usize = 1024;

/// `lhs rhs` at `out`, rows `stride` apart, or added to it, for operands of which one is read or written once: a right matrix that comes from
/// memory, whose parts are asked for while the ones before them are multiplied, and two matrices at most that this thread reads `next`, last;
/// or a result that goes to memory, past the caches where `past` and lines of the cache allow it.
///
/// # Safety
/// Nobody else may have `lhs.nrows()` rows of `rhs.ncols()` numbers at `out`, which hold values if they are added to.
///
/// # Panics
/// If neither the rows nor the columns of `rhs` are unbroken, or there is no depth.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn product(
    out: *mut f32,
    stride: usize,
    add: bool,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    next: &[MatRef<'_, f32>],
    past: bool,
) {
    let (depth, columns) = (rhs.nrows(), rhs.ncols());
    assert!(depth > 0 && lhs.ncols() == depth);
    // Rows a multiple of this many numbers apart meet in a few sets of the second cache.
    let direct = rhs.col_stride() == 1 && rhs.row_stride() % 1024 != 0;
    let deep = depth.div_ceil(depth.div_ceil(if direct { DEEP } else { DEPTH }));
    let past = past
        && !add
        && deep == depth
        && stride.is_multiple_of(LANES)
        && out.addr().is_multiple_of(size_of::<__m512>());
    let mut panel = Vec::<Row>::with_capacity(deep);
    for first in (0..columns).step_by(PANEL) {
        for from in (0..depth).step_by(deep) {
            let now = part(rhs, from, deep, first);
            let whole = now.ncols() == PANEL;
            let (weights, below) = if direct && whole {
                (now.as_ptr(), now.row_stride())
            } else {
                let panel = &mut panel.spare_capacity_mut()[..now.nrows()];
                if now.col_stride() == 1 {
                    copy(now, panel)
                } else {
                    transpose(now, panel)
                }
                (panel.as_ptr().cast::<f32>(), PANEL as isize)
            };
            let lines = if from + deep < depth {
                [Lines::of(part(rhs, from + deep, deep, first)), Lines::NONE]
            } else if first + PANEL < columns {
                [Lines::of(part(rhs, 0, deep, first + PANEL)), Lines::NONE]
            } else {
                let next = |i: usize| next.get(i).map_or(Lines::NONE, |next| Lines::of(*next));
                [next(0), next(1)]
            };
            let slots = lhs.nrows().div_ceil(TALL) * now.nrows().div_ceil(PANEL);
            let tiles = match now.ncols().div_ceil(LANES) {
                1 => tiles::<1, false>,
                2 => tiles::<2, false>,
                3 => tiles::<3, false>,
                _ if past && whole => tiles::<4, true>,
                _ => tiles::<4, false>,
            };
            let task = Task {
                lhs: lhs.subcols(from, now.nrows()),
                weights,
                below,
                count: now.ncols(),
                add: add || from > 0,
                stride,
                ahead: Ahead::new(lines, slots),
            };
            // SAFETY: the weights are a whole part, or the panel, whose rows have been written up to the vectors that `count` outputs take; of
            // `out` this is a part, written before it is added to.
            unsafe { tiles(&task, out.add(first)) };
        }
    }
    if past {
        // What goes past the caches is in no order with what is written afterwards, as that this task is done.
        _mm_sfence();
    }
}

/// `deep` rows of a panel, or those that are left, from a row and an output on.
fn part(of: MatRef<'_, f32>, from: usize, deep: usize, first: usize) -> MatRef<'_, f32> {
    of.submatrix(from, first, deep.min(of.nrows() - from), PANEL.min(of.ncols() - first))
}

/// Rows times a part of the right matrix.
struct Task<'a> {
    lhs: MatRef<'a, f32>,
    /// For each column of `lhs` a row, `below` from one to the next, of which the vectors of `count` outputs are read.
    weights: *const f32,
    below: isize,
    count: usize,
    /// Whether the product is added to what `out` holds.
    add: bool,
    /// Between rows of `out`.
    stride: usize,
    ahead: Ahead,
}

/// Rows of a tile.
const TALL: usize = 6;

/// # Safety
/// [`Task::weights`] have to be as it says, and `out` this thread's alone and written if it is added to. Past the caches go whole vectors of lines.
#[target_feature(enable = "avx512f")]
unsafe fn tiles<const V: usize, const PAST: bool>(task: &Task<'_>, out: *mut f32) {
    let rows = task.lhs.nrows();
    let groups = rows.div_ceil(TALL);
    for group in 0..groups {
        let row = group * rows / groups;
        let tile = match (group + 1) * rows / groups - row {
            1 => tile::<1, V, PAST>,
            2 => tile::<2, V, PAST>,
            3 => tile::<3, V, PAST>,
            4 => tile::<4, V, PAST>,
            5 => tile::<5, V, PAST>,
            _ => tile::<6, V, PAST>,
        };
        // SAFETY: the caller's; the groups are all rows.
        unsafe { tile(task, row, group, out.add(row * task.stride)) };
    }
}

/// `R` rows from `row` on by `V` vectors of outputs, in registers.
///
/// # Safety
/// As for [`tiles`]; the rows have to be there.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const R: usize, const V: usize, const PAST: bool>(
    task: &Task<'_>,
    row: usize,
    group: usize,
    out: *mut f32,
) {
    let Task { lhs, count, add, stride, .. } = *task;
    let (across, depth) = (lhs.row_stride(), lhs.ncols());
    let at = |r: usize, v: usize| out.wrapping_add(r * stride + v * LANES);
    if add {
        for r in 0..R {
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(at(r, v).cast());
            }
        }
    }
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let mut x = lhs.as_ptr().wrapping_offset(row as isize * across);
    let mut w = task.weights;
    let runs = depth.div_ceil(PANEL);
    for run in 0..runs {
        let (mut line, step) = task.ahead.slot(group * runs + run);
        let mut left = PANEL.min(depth - run * PANEL);
        while left > 0 {
            _mm_prefetch::<_MM_HINT_T1>(line.cast());
            line = line.wrapping_offset(step);
            let columns = task.ahead.every.min(left);
            left -= columns;
            for _ in 0..columns {
                let mut outputs = [_mm512_setzero_ps(); V];
                for (v, outputs) in outputs.iter_mut().enumerate() {
                    // SAFETY: one of the rows; there are as many as columns of `lhs`.
                    *outputs = unsafe { _mm512_loadu_ps(w.add(v * LANES)) };
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: a column of `lhs`, in one of its rows.
                    let x = _mm512_set1_ps(unsafe { *x.offset(r as isize * across) });
                    for (sum, outputs) in sums.iter_mut().zip(outputs) {
                        *sum = _mm512_fmadd_ps(x, outputs, *sum);
                    }
                }
                x = x.wrapping_offset(lhs.col_stride());
                w = w.wrapping_offset(task.below);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (v, mut sum) in sums.into_iter().enumerate() {
            if PAST {
                // SAFETY: the caller's.
                unsafe { _mm512_stream_ps(at(r, v), sum) };
                continue;
            }
            let mask = mask(count - v * LANES);
            // SAFETY: of `out` the lanes of `mask` are the outputs that there are.
            unsafe {
                if add {
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, at(r, v)));
                }
                _mm512_mask_storeu_ps(at(r, v), mask, sum);
            }
        }
    }
}
