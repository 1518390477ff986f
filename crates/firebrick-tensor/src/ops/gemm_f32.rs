//! Products of f32 matrices on slices by the library `gemm`, on the calling thread or on several.
//!
//! Where the right matrix lies output by output, as the weights of files do, `gemm` would gather its panels of 64 outputs number by number.
//! With AVX-512 panels are transposed in registers here, and are the tasks of the threads.

use std::mem::MaybeUninit;

use faer::MatRef;

use super::awake::{self, Start};

/// Outputs of a panel: what `gemm`'s kernel for AVX-512 takes at a time.
const PANEL: usize = 64;

/// `dst = alpha * lhs rhs`, or added to `dst`, on the calling thread; `dst` is row-major without gaps.
pub(super) fn gemm(dst: &mut [f32], add: bool, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, alpha: f32) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    // SAFETY: `dst` has room for the result and holds values.
    unsafe { gemm_at(dst.as_mut_ptr(), rhs.ncols(), add, lhs, rhs, alpha) }
}

/// `lhs rhs` in memory that holds nothing, as [`gemm`].
pub(super) fn gemm_into(dst: &mut [MaybeUninit<f32>], lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>) {
    assert_eq!(dst.len(), lhs.nrows() * rhs.ncols(), "gemm: room for the result");
    if rhs.nrows() == 0 {
        return dst.fill(MaybeUninit::new(0.0));
    }
    // SAFETY: `dst` has room for the result, of which nothing is read.
    unsafe { gemm_at(dst.as_mut_ptr().cast(), rhs.ncols(), false, lhs, rhs, 1.0) }
}

/// Writes `lhs rhs` to `out`, row-major, or adds it to what `out` then has to hold.
///
/// Each thread has panels or columns of its own, or rows where those are few: `gemm`'s own threads wait for each other block by block. The
/// order of a sum depends on its length alone, but for results of 64 by 64 numbers at most, which a part is only if all are: so parts
/// never show.
pub(super) fn gemm_f32(
    out: &mut [MaybeUninit<f32>],
    add: bool,
    lhs: MatRef<'_, f32>,
    rhs: MatRef<'_, f32>,
    threads: usize,
) {
    /// Multiplications for which one thread is enough.
    const ONE_THREAD: usize = 1 << 20;
    /// Rows or columns of a part, at least, where there are more.
    const LEAST: usize = PANEL + 1;
    let (rows, depth, columns) = (lhs.nrows(), lhs.ncols(), rhs.ncols());
    assert!(out.len() >= rows * columns && depth == rhs.nrows());
    // Sums of a product with a vector depend on how many there are.
    let alone = rows.saturating_mul(depth).saturating_mul(columns) < ONE_THREAD || rows.min(columns) == 1;
    let threads = if alone { 1 } else { threads };
    let part = |i: usize, of: usize, parts: usize| i * of / parts..(i + 1) * of / parts;
    let mut parts = Vec::new();
    if in_panels(lhs, rhs) {
        let panels = columns.div_ceil(PANEL);
        // What does not go round is cut by rows.
        let whole = panels / threads * threads;
        for panel in 0..panels {
            let across = panel * PANEL..columns.min((panel + 1) * PANEL);
            let down = if panel < whole { 1 } else { threads.div_ceil(panels - whole) };
            let down = down.min(rows / LEAST).max(1);
            parts.extend((0..down).map(|i| (part(i, rows, down), across.clone())));
        }
    } else {
        // For each part the library packs all of a left matrix that lies column by column, which takes longer than the right one.
        let by_rows = lhs.col_stride() != 1 && columns < 4 * rows;
        let most = |count: usize, threads: usize| (count / LEAST).clamp(1, threads);
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

    let out = Start(out.as_mut_ptr().cast::<f32>());
    awake::each(parts, |(down, across)| {
        let lhs = lhs.subrows(down.start, down.len());
        let rhs = rhs.subcols(across.start, across.len());
        // SAFETY: `out` has room for the result, of which each part is one task's, and holds values if they are added to.
        unsafe { gemm_at(out.at(down.start * columns + across.start), columns, add, lhs, rhs, 1.0) }
    });
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
    #[cfg(target_arch = "x86_64")]
    let able = is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let able = false;
    let large = lhs.nrows() >= ROWS && rhs.ncols() >= PANEL && rhs.nrows() >= 16;
    able && large && lhs.col_stride() == 1 && rhs.row_stride() == 1
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    use faer::MatRef;

    use super::PANEL;

    /// Numbers of a vector.
    const LANES: usize = 16;

    /// A row of a panel. Vectors that do not cross lines of the cache are read twice as fast.
    #[repr(align(64))]
    #[expect(dead_code, reason = "read and written by address")]
    pub(super) struct Row([f32; PANEL]);

    /// Writes the rows of `columns`, whose columns are unbroken, at most [`PANEL`] of them.
    #[target_feature(enable = "avx512f")]
    pub(super) fn transpose(columns: MatRef<'_, f32>, rows: &mut [MaybeUninit<Row>]) {
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
        for j in 0..count {
            let from = if j < whole_count { whole_depth } else { 0 };
            for p in from..depth {
                // SAFETY: row `p` is one of `rows`, which has `PANEL` numbers.
                unsafe { out.add(p * PANEL + j).write(columns[(p, j)]) };
            }
        }
    }

    /// Sixteen rows of sixteen numbers at `to`, [`PANEL`] apart, of sixteen columns at `from`, `stride` apart.
    ///
    /// # Safety
    /// All of both has to be there, and `to` for this thread alone.
    #[target_feature(enable = "avx512f")]
    unsafe fn square(from: *const f32, stride: isize, to: *mut f32) {
        // SAFETY: the caller's.
        let r: [__m512; LANES] =
            std::array::from_fn(|i| unsafe { _mm512_loadu_ps(from.offset(i as isize * stride)) });
        let wide = |v| _mm512_castps_pd(v);
        let narrow = |v| _mm512_castpd_ps(v);
        // Fours of numbers by fours of columns: number `4 q + n` of columns `4 c..` is part `q` of `fours[c][n]`.
        let mut fours = [[_mm512_setzero_ps(); 4]; 4];
        for (c, fours) in fours.iter_mut().enumerate() {
            let [a, b, c, d] = [r[4 * c], r[4 * c + 1], r[4 * c + 2], r[4 * c + 3]];
            let (ab, cd) = (wide(_mm512_unpacklo_ps(a, b)), wide(_mm512_unpacklo_ps(c, d)));
            fours[0] = narrow(_mm512_unpacklo_pd(ab, cd));
            fours[1] = narrow(_mm512_unpackhi_pd(ab, cd));
            let (ab, cd) = (wide(_mm512_unpackhi_ps(a, b)), wide(_mm512_unpackhi_ps(c, d)));
            fours[2] = narrow(_mm512_unpacklo_pd(ab, cd));
            fours[3] = narrow(_mm512_unpackhi_pd(ab, cd));
        }
        for n in 0..4 {
            let [a, b, c, d] = [fours[0][n], fours[1][n], fours[2][n], fours[3][n]];
            // Parts 0 and 2, or 1 and 3, of two.
            let (ab_even, ab_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let (cd_even, cd_odd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
            let parts = [
                _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even),
                _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd),
                _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even),
                _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd),
            ];
            for (q, part) in parts.into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm512_storeu_ps(to.add((4 * q + n) * PANEL), part) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use firebrick_core::Seed;

    use super::*;

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
                    // SAFETY: values that are there may be seen as values that may not be; the product writes values alone.
                    let room =
                        unsafe { &mut *(std::ptr::from_mut(out.as_mut_slice()) as *mut [MaybeUninit<f32>]) };
                    gemm_f32(room, add, lhs, rhs, threads);
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
                    // SAFETY: as above.
                    let room =
                        unsafe { &mut *(std::ptr::from_mut(out.slice_mut()) as *mut [MaybeUninit<f32>]) };
                    gemm_f32(room, add, lhs, right, 2);
                    assert!(*out.slice() == *product(rhs, 2), "{name}, at the end of memory");
                }
                let far =
                    product(by_input, 2).iter().zip(&one).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 1e-3, "{name}, input by input: {far:e} away");
            }
        }
    }
}
