//! Products of f32 matrices on slices by the library `gemm`, on the calling thread or on several.
//!
//! Where the right matrix lies output by output, as the weights of files do, `gemm` would gather its panels of 64 outputs number by number.
//! With AVX-512 panels are transposed in registers here, and are the tasks of the threads. Where few rows meet a matrix that comes from
//! memory, as those of an expert do, the library waits for memory and then computes; there the product is our own.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::mem::MaybeUninit;
use std::ops::Range;

use faer::MatRef;
use half::bf16;

use super::awake::{self, Start};

/// Outputs of a panel: what `gemm`'s kernel for AVX-512 takes at a time.
const PANEL: usize = 64;

/// A row of a panel. Vectors that do not cross lines of the cache are read twice as fast.
#[repr(align(64))]
#[expect(dead_code, reason = "read by address")]
pub(super) struct Row(pub(super) [f32; PANEL]);

/// `dst = alpha * lhs rhs`, or added to `dst`, on the calling thread; `dst` is row-major without gaps.
pub(super) fn gemm(dst: &mut [f32], add: bool, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, alpha: f32) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    // SAFETY: `dst` has room for the result and holds values.
    unsafe { gemm_at(dst.as_mut_ptr(), rhs.ncols(), add, lhs, rhs, alpha) }
}

/// `lhs rhs` in memory that holds nothing, in rows `stride` apart.
///
/// # Safety
/// Nobody else may have these rows.
pub(super) unsafe fn gemm_rows(dst: *mut f32, stride: usize, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>) {
    assert!(rhs.nrows() > 0, "gemm: a sum of nothing");
    // SAFETY: the caller's; nothing is read of `dst`.
    unsafe { gemm_at(dst, stride, false, lhs, rhs, 1.0) }
}

/// `lhs rhs` in memory that holds nothing, for a right matrix that comes from memory and few rows that it is multiplied by; `next` are two matrices at most that this
/// thread reads afterwards (of a right one its [`panel`]).
pub(super) fn gemm_ahead(
    dst: &mut [MaybeUninit<f32>],
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    next: &[MatRef<'_, f32>],
) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    // SAFETY: `dst` has room for the result, of which nothing is read.
    unsafe { ahead(dst.as_mut_ptr().cast(), false, lhs, rhs, next) }
}

/// As [`gemm_ahead`], added to `dst`.
pub(super) fn gemm_add_ahead(
    dst: &mut [f32],
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    next: &[MatRef<'_, f32>],
) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    // SAFETY: `dst` has room for the result and holds values.
    unsafe { ahead(dst.as_mut_ptr(), true, lhs, rhs, next) }
}

/// # Safety
/// Nobody else may have `lhs.nrows()` rows of `rhs.ncols()` numbers at `dst`, which hold values if they are added to.
unsafe fn ahead(
    dst: *mut f32,
    add: bool,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    next: &[MatRef<'_, f32>],
) {
    #[cfg(target_arch = "x86_64")]
    if able() && rhs.nrows() > 0 && (rhs.row_stride() == 1 || rhs.col_stride() == 1) {
        // SAFETY: the processor has these instructions; of `dst` the caller's.
        return unsafe { x86::product(dst, rhs.ncols(), add, lhs, rhs, next, false) };
    }
    assert!(rhs.nrows() > 0, "gemm: a sum of nothing");
    // SAFETY: the caller's.
    unsafe { gemm_at(dst, rhs.ncols(), add, lhs, rhs, 1.0) }
}

/// [`gemm_ahead`] for a result that is larger than the operands and is not read soon.
pub(super) fn gemm_past(
    dst: &mut [MaybeUninit<f32>],
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    next: &[MatRef<'_, f32>],
) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    let at = dst.as_mut_ptr().cast();
    #[cfg(target_arch = "x86_64")]
    if able() && (1..=x86::DEEP).contains(&rhs.nrows()) && rhs.col_stride() == 1 {
        // SAFETY: the processor has these instructions; `dst` has room for the result.
        return unsafe { x86::product(at, rhs.ncols(), false, lhs, rhs, next, true) };
    }
    // SAFETY: `dst` has room for the result, of which nothing is read.
    unsafe { gemm_rows(at, rhs.ncols(), lhs, rhs) }
}

/// The first outputs of a right matrix, which a product reads first.
pub(super) fn panel(rhs: MatRef<'_, f32>) -> MatRef<'_, f32> {
    rhs.subcols(0, PANEL.min(rhs.ncols()))
}

/// Whether this processor has what panels take.
fn able() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Writes the sum of `products`, each of a left and a right matrix, to `out`, row-major, or adds it to what `out` then has to hold. The
/// first is the large one: the others are added while its part of the result is in a cache.
///
/// Each thread has panels or columns of its own, or rows where those are few: `gemm`'s own threads wait for each other block by block. The
/// order of a sum depends on its length alone, but for results of 64 by 64 numbers at most, which a part is only if all are: so parts
/// never show.
pub(super) fn gemm_f32(
    out: &mut [MaybeUninit<f32>],
    add: bool,
    products: &[[MatRef<'_, f32>; 2]],
    threads: usize,
) {
    let [lhs, rhs] = products[0];
    let (rows, depth, columns) = (lhs.nrows(), lhs.ncols(), rhs.ncols());
    let fits = |[lhs, rhs]: &[MatRef<'_, f32>; 2]| (lhs.nrows(), rhs.ncols()) == (rows, columns);
    assert!(out.len() >= rows * columns && products.iter().all(fits), "gemm: shapes of products");
    let threads = threads_for([rows, depth, columns], threads);
    let mut parts = Vec::new();
    if in_panels(lhs, rhs) {
        parts = panels(rows, columns, threads);
    } else {
        // For each part the library packs all of a left matrix that lies column by column, which takes longer than the right one.
        let by_rows = lhs.col_stride() != 1 && columns < 4 * rows;
        let most = |count: usize, threads: usize| (count / LEAST).clamp(1, threads);
        let whole = columns / PANEL / threads * PANEL;
        if !by_rows && whole > 0 && rows >= LEAST && threads > 1 {
            // Whole panels, of which half a one takes as long; what does not go round is cut by rows.
            parts.extend((0..threads).map(|i| (0..rows, i * whole..(i + 1) * whole)));
            let rest = threads * whole..columns;
            let down = if rest.is_empty() { 0 } else { most(rows, threads) };
            parts.extend((0..down).map(|i| (part(i, rows, down), rest.clone())));
        } else {
            let (down, across) = if by_rows {
                let down = most(rows, threads);
                (down, most(columns, threads.div_ceil(down)))
            } else {
                let across = most(columns, threads);
                (most(rows, threads.div_ceil(across)), across)
            };
            for i in 0..down {
                parts.extend((0..across).map(|j| (part(i, rows, down), part(j, columns, across))));
            }
        }
    }

    let out = Start(out.as_mut_ptr().cast::<f32>());
    awake::each(parts, |(down, across)| {
        for (i, [lhs, rhs]) in products.iter().enumerate() {
            let lhs = lhs.subrows(down.start, down.len());
            let rhs = rhs.subcols(across.start, across.len());
            let at = out.at(down.start * columns + across.start);
            // SAFETY: `out` has room for the result, of which each part is one task's, and holds values if they are added to.
            unsafe { gemm_at(at, columns, add || i > 0, lhs, rhs, 1.0) }
        }
    });
}

/// How many threads a product takes.
fn threads_for([rows, depth, columns]: [usize; 3], threads: usize) -> usize {
    /// Multiplications for which one is enough.
    const ONE_THREAD: usize = 1 << 20;
    // Sums of a product with a vector depend on how many there are.
    let alone = rows.saturating_mul(depth).saturating_mul(columns) < ONE_THREAD || rows.min(columns) == 1;
    if alone { 1 } else { threads }
}

/// Rows or columns of a part, at least, where there are more.
const LEAST: usize = PANEL + 1;

/// Part `i` of `parts` about even ones.
fn part(i: usize, of: usize, parts: usize) -> Range<usize> {
    i * of / parts..(i + 1) * of / parts
}

/// Rows and columns of parts that are panels, of which those that do not go round are cut by rows.
fn panels(rows: usize, columns: usize, threads: usize) -> Vec<(Range<usize>, Range<usize>)> {
    let panels = columns.div_ceil(PANEL);
    let whole = panels / threads * threads;
    let mut parts = Vec::new();
    for panel in 0..panels {
        let across = panel * PANEL..columns.min((panel + 1) * PANEL);
        let down = if panel < whole { 1 } else { threads.div_ceil(panels - whole) };
        let down = down.min(rows / LEAST).max(1);
        parts.extend((0..down).map(|i| (part(i, rows, down), across.clone())));
    }
    parts
}

/// Writes `lhs rhs` to `out`, row-major, or adds it to what `out` then has to hold, for a right matrix of bf16 numbers that lies output by
/// output.
pub(super) fn gemm_widened(
    out: &mut [MaybeUninit<f32>],
    add: bool,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, bf16>,
    threads: usize,
) {
    assert_eq!(lhs.ncols(), rhs.nrows(), "gemm: shapes of a product");
    gemm_of_panels(out, add, lhs, rhs.ncols(), threads, |across, rows| {
        widen_panel(rhs.subcols(across.start, across.len()), rows);
    });
}

/// Writes `lhs rhs` to `out`, row-major, or adds it to what `out` then has to hold, for a right matrix of `columns` columns that is not one of
/// f32: `write` pushes the rows of those columns, 64 at most, that a task multiplies by, one for each column of `lhs`.
pub(super) fn gemm_of_panels(
    out: &mut [MaybeUninit<f32>],
    add: bool,
    lhs: MatRef<'_, f32>,
    columns: usize,
    threads: usize,
    write: impl Fn(Range<usize>, &mut Vec<Row>) + Sync,
) {
    let (rows, depth) = (lhs.nrows(), lhs.ncols());
    assert!(out.len() >= rows * columns, "gemm: room for the result");
    let out = Start(out.as_mut_ptr().cast::<f32>());
    let threads = threads_for([rows, depth, columns], threads);
    awake::each(panels(rows, columns, threads), |(down, across)| {
        let lhs = lhs.subrows(down.start, down.len());
        let mut panel = Vec::with_capacity(depth);
        write(across.clone(), &mut panel);
        assert_eq!(panel.len(), depth, "gemm: rows of a panel");
        // SAFETY: as many numbers as there are in each row, in rows that far apart.
        let panel =
            unsafe { MatRef::from_raw_parts(panel.as_ptr().cast(), depth, across.len(), PANEL as isize, 1) };
        // SAFETY: `out` has room for the result, of which each part is one task's, and holds values if they are added to.
        unsafe { gemm_at(out.at(down.start * columns + across.start), columns, add, lhs, panel, 1.0) }
    });
}

/// Pushes the rows of at most [`PANEL`] columns that are unbroken.
fn widen_panel(columns: MatRef<'_, bf16>, rows: &mut Vec<Row>) {
    let depth = columns.nrows();
    #[cfg(target_arch = "x86_64")]
    if able() {
        rows.reserve(depth);
        // SAFETY: the processor has these instructions, which write all of these rows.
        unsafe {
            x86::transpose(columns, &mut rows.spare_capacity_mut()[..depth]);
            rows.set_len(rows.len() + depth);
        }
        return;
    }
    rows.extend((0..depth).map(|p| {
        let number = |j| if j < columns.ncols() { columns[(p, j)].to_f32() } else { 0.0 };
        Row(std::array::from_fn(number))
    }));
}

/// [`gemm`] on rows `stride` apart.
///
/// # Safety
/// Nobody else may have `lhs.nrows()` rows of `rhs.ncols()` numbers at `dst`, which hold values if they are added to.
unsafe fn gemm_at(
    dst: *mut f32,
    stride: usize,
    add: bool,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    alpha: f32,
) {
    #[cfg(target_arch = "x86_64")]
    if in_panels(lhs, rhs) {
        let depth = rhs.nrows();
        let mut panel = Vec::with_capacity(depth);
        for first in (0..rhs.ncols()).step_by(PANEL) {
            let columns = rhs.subcols(first, PANEL.min(rhs.ncols() - first));
            // SAFETY: the processor has these instructions, or there were no panels.
            unsafe { x86::transpose(columns, &mut panel.spare_capacity_mut()[..depth]) };
            // SAFETY: all that is read of the panel has been written; of `dst` this is a part.
            unsafe {
                let panel = MatRef::from_raw_parts(
                    panel.as_ptr().cast::<f32>(),
                    depth,
                    columns.ncols(),
                    PANEL as isize,
                    1,
                );
                gemm_at(dst.add(first), stride, add, lhs, panel, alpha);
            }
        }
        return;
    }
    let (rows, depth, columns) = (lhs.nrows(), lhs.ncols(), rhs.ncols());
    assert_eq!(depth, rhs.nrows(), "gemm: columns of lhs against rows of rhs");
    // SAFETY: views lead to values; of `dst` the caller has said what `gemm` needs.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            dst,
            1,
            stride as isize,
            add,
            lhs.as_ptr(),
            lhs.col_stride(),
            lhs.row_stride(),
            rhs.as_ptr(),
            rhs.col_stride(),
            rhs.row_stride(),
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Whether panels are transposed for a product: for one of whole rows with outputs whose numbers lie together.
fn in_panels(lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>) -> bool {
    /// Rows for which it pays.
    const ROWS: usize = 8;
    let large = lhs.nrows() >= ROWS && rhs.ncols() >= PANEL && rhs.nrows() >= 16;
    able() && large && lhs.col_stride() == 1 && rhs.row_stride() == 1
}

#[cfg(test)]
mod tests {
    use firebrick_core::Seed;

    use super::super::cpu;
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn products_of_few_rows_are_those_of_numbers() {
        use super::super::guarded::Guarded;
        #[derive(Clone, Copy, PartialEq)]
        enum Way {
            Ahead,
            Added,
            Past,
        }
        let mut shapes = Vec::new();
        for rows in [1, 5, 6, 7, 13, 67] {
            for depth in [1, 15, 64, 65, 191, 193, 401] {
                // The last one's rows are whole lines of the cache.
                shapes.extend([1, 15, 16, 63, 64, 65, 130, 192].map(|columns| (rows, depth, columns)));
            }
        }
        // Two parts of a matrix that is read as it lies, and rows that meet in a few sets of a cache.
        shapes.extend([(7, 1100, 130), (7, 33, 1024)]);
        for (rows, depth, columns) in shapes {
            let numbers = |name: &str, count: usize| Guarded::new(&Seed(1).normal(name, count, 1.0));
            let (lhs, rhs) = (numbers("lhs", rows * depth), numbers("rhs", columns * depth));
            let lhs = MatRef::from_row_major_slice(lhs.slice(), rows, depth);
            let by_input = MatRef::from_row_major_slice(rhs.slice(), depth, columns);
            let by_output = MatRef::from_column_major_slice(rhs.slice(), depth, columns);
            for (rhs, way) in [
                (by_input, Way::Ahead),
                (by_input, Way::Added),
                (by_input, Way::Past),
                (by_output, Way::Ahead),
                (by_output, Way::Added),
            ] {
                let before = if way == Way::Added { 1.0 } else { f32::NAN };
                let mut out = Guarded::new(&vec![before; rows * columns]);
                match way {
                    Way::Ahead => gemm_ahead(cpu::room(out.slice_mut()), lhs, rhs, &[lhs, panel(by_output)]),
                    Way::Added => gemm_add_ahead(out.slice_mut(), lhs, rhs, &[panel(by_input)]),
                    Way::Past => gemm_past(cpu::room(out.slice_mut()), lhs, rhs, &[]),
                }
                for (i, found) in out.slice().iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let terms = || (0..depth).map(|p| f64::from(lhs[(row, p)]) * f64::from(rhs[(p, column)]));
                    let before = if way == Way::Added { 1.0 } else { 0.0 };
                    let far = (f64::from(*found) - before - terms().sum::<f64>()).abs();
                    let size = before + terms().map(f64::abs).sum::<f64>();
                    assert!(far <= 1e-5 * size, "[{rows}, {depth}] [{depth}, {columns}]: {far:e}");
                }
            }
        }
    }

    #[test]
    fn parts_of_threads_do_not_show() {
        let shapes = [
            (512, 576, 192),
            (131, 700, 257),
            (131, 701, 326),
            (66, 523, 67),
            (1000, 1100, 8),
            (4000, 600, 1),
            (1, 600, 4000),
            (8, 700, 999),
            (64, 1000, 64),
        ];
        for (rows, depth, columns) in shapes {
            let numbers = |name: &str, count: usize| Seed(1).normal(name, count, 1.0);
            let (lhs, by_output) = (numbers("lhs", rows * depth), numbers("rhs", columns * depth));
            let lhs = MatRef::from_row_major_slice(&lhs, rows, depth);
            let by_output = MatRef::from_column_major_slice(&by_output, depth, columns);
            let by_input: Vec<f32> =
                (0..depth * columns).map(|i| by_output[(i / columns, i % columns)]).collect();
            let by_input = MatRef::from_row_major_slice(&by_input, depth, columns);
            for add in [false, true] {
                let product = |rhs: MatRef<'_, f32>, threads: usize| {
                    let mut out =
                        if add { numbers("sum", rows * columns) } else { vec![f32::NAN; rows * columns] };
                    gemm_f32(cpu::room(&mut out), add, &[[lhs, rhs]], threads);
                    out
                };
                let one = product(by_output, 1);
                assert!(one.iter().all(|v| v.is_finite()));
                let exact = |i: usize, j: usize| -> f64 {
                    (0..depth).map(|p| f64::from(lhs[(i, p)]) * f64::from(by_output[(p, j)])).sum()
                };
                let sum = numbers("sum", rows * columns);
                for (i, j) in [(0, 0), (rows / 2, columns / 3), (rows - 1, columns - 1)] {
                    let want = exact(i, j) + if add { f64::from(sum[i * columns + j]) } else { 0.0 };
                    assert!((f64::from(one[i * columns + j]) - want).abs() < 1e-3, "[{i}, {j}]");
                }
                let name = format!("[{rows}, {depth}] [{depth}, {columns}]");
                for threads in [2, 3, 5, 16] {
                    assert!(product(by_output, threads) == one, "{name}, {threads} threads");
                }
                #[cfg(target_os = "linux")]
                for rhs in [by_output, by_input] {
                    use super::super::guarded::Guarded;
                    let copy = |x: MatRef<'_, f32>, by_row: bool| {
                        let (lines, depth) =
                            if by_row { (x.nrows(), x.ncols()) } else { (x.ncols(), x.nrows()) };
                        let at = |i: usize| {
                            if by_row { x[(i / depth, i % depth)] } else { x[(i % depth, i / depth)] }
                        };
                        Guarded::new(&(0..lines * depth).map(at).collect::<Vec<f32>>())
                    };
                    let (lhs, right) = (copy(lhs, true), copy(rhs, rhs.col_stride() == 1));
                    let lhs = MatRef::from_row_major_slice(lhs.slice(), rows, depth);
                    let right = match rhs.col_stride() {
                        1 => MatRef::from_row_major_slice(right.slice(), depth, columns),
                        _ => MatRef::from_column_major_slice(right.slice(), depth, columns),
                    };
                    let sums = if add { numbers("sum", rows * columns) } else { vec![0.0; rows * columns] };
                    let mut out = Guarded::new(&sums);
                    gemm_f32(cpu::room(out.slice_mut()), add, &[[lhs, right]], 2);
                    assert!(*out.slice() == *product(rhs, 2), "{name}, at the end of memory");
                }
                let far =
                    product(by_input, 2).iter().zip(&one).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 1e-3, "{name}, input by input: {far:e} away");
            }
        }
    }
}
