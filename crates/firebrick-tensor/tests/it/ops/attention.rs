use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{AttentionOptions, Segments, attention, segmented_attention};

use super::support::{Case, devices, devices_and, flat, host, normal, of_products};

#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    t: usize,
    s: usize,
    d: usize,
    dv: usize,
}

/// Which keys a query sees and whose keys a head reads; the knobs that wrong implementations get wrong.
struct Rule<'a> {
    position: &'a dyn Fn(usize) -> usize,
    sees: &'a dyn Fn(usize, usize) -> bool,
    kv_head: &'a dyn Fn(usize) -> usize,
}

fn reference(x: &[Vec<f64>], shape: &Shape, o: &AttentionOptions, rule: &Rule) -> Vec<f64> {
    let Shape { batch, heads, kv_heads, t, s, d, dv } = *shape;
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let mut out = Vec::new();
    for b in 0..batch {
        for h in 0..heads {
            let kv = b * kv_heads + (rule.kv_head)(h);
            for i in 0..t {
                let q = &q[((b * heads + h) * t + i) * d..][..d];
                let score = |j: usize| {
                    let k = &k[(kv * s + j) * d..][..d];
                    let score = q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * o.scale;
                    let score = o.softcap.map_or(score, |cap| cap * (score / cap).tanh());
                    if (rule.sees)((rule.position)(i), j) { score } else { f64::NEG_INFINITY }
                };
                let scores: Vec<f64> = (0..s).map(score).collect();
                let max = scores.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
                let p: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                for c in 0..dv {
                    out.push((0..s).map(|j| p[j] * v[(kv * s + j) * dv + c]).sum::<f64>() / sum);
                }
            }
        }
    }
    out
}

/// On the CPU, and on GPUs if they take this shape.
fn check(gpus: bool, shape: Shape, o: AttentionOptions) {
    let Shape { batch, heads, kv_heads, t, s, d, dv } = shape;
    let (causal, window, group) = (o.causal, o.window, heads / kv_heads);
    let sees = move |p: usize, j: usize| (!causal || j <= p) && window.is_none_or(|w| p.abs_diff(j) < w);
    let right = Rule { position: &|i| s - t + i, sees: &sees, kv_head: &|h| h / group };
    let case = Case {
        name: format!("attention {shape:?} {o:?}"),
        inputs: vec![
            normal("q", batch * heads * t * d),
            normal("k", batch * kv_heads * s * d),
            normal("v", batch * kv_heads * s * dv),
        ],
        op: &|x| {
            let [q, k, v] = x.try_into().expect("three inputs");
            let q = q.reshape([batch, heads, t, d]);
            let y = attention(
                q,
                k.reshape([batch, kv_heads, s, d]),
                v.reshape([batch, kv_heads, s, dv]),
                o.clone(),
            );
            y.reshape([batch * heads * t * dv])
        },
        reference: &|x| reference(x, &shape, &o, &right),
    };
    for device in devices_and(gpus) {
        case.check(&device, of_products(&device, 3e-6), Some(1e-6));
        if s < 3 {
            continue;
        }
        if o.causal {
            // The query's own key hidden, and queries counted from the first key.
            let strict = |p: usize, j: usize| sees(p, j) && (j < p || p == 0);
            case.refutes(&device, &|x| reference(x, &shape, &o, &Rule { sees: &strict, ..right }));
            if s > t {
                case.refutes(&device, &|x| reference(x, &shape, &o, &Rule { position: &|i| i, ..right }));
            }
        }
        if let Some(w) = o.window {
            let wider = |p: usize, j: usize| (!o.causal || j <= p) && p.abs_diff(j) <= w;
            case.refutes(&device, &|x| reference(x, &shape, &o, &Rule { sees: &wider, ..right }));
        }
        if group > 1 && kv_heads > 1 {
            case.refutes(&device, &|x| {
                reference(x, &shape, &o, &Rule { kv_head: &|h| h % kv_heads, ..right })
            });
        }
        if o.softcap.is_some() {
            let uncapped = AttentionOptions { softcap: None, ..o.clone() };
            case.refutes(&device, &|x| reference(x, &shape, &uncapped, &right));
        }
    }
}

fn options(causal: bool, window: Option<usize>, softcap: Option<f64>) -> AttentionOptions {
    AttentionOptions { scale: 0.6, causal, window, softcap }
}

fn shape(batch: usize, [heads, kv_heads]: [usize; 2], [t, s]: [usize; 2], [d, dv]: [usize; 2]) -> Shape {
    Shape { batch, heads, kv_heads, t, s, d, dv }
}

#[test]
fn one_token_and_plain() {
    check(false, shape(1, [1, 1], [1, 1], [1, 1]), options(true, None, None));
    check(true, shape(2, [3, 3], [5, 5], [8, 8]), options(false, None, None));
    check(false, shape(1, [2, 2], [3, 7], [5, 11]), options(false, None, None));
}

#[test]
fn causal_and_grouped() {
    check(false, shape(1, [6, 2], [7, 7], [16, 16]), options(true, None, None));
    check(true, shape(2, [3, 1], [4, 9], [5, 3]), options(true, None, None));
    check(false, shape(1, [3, 3], [1, 13], [4, 4]), options(true, None, None));
}

#[test]
fn window_and_softcap() {
    check(false, shape(1, [6, 2], [11, 11], [8, 8]), options(true, Some(3), None));
    check(false, shape(2, [3, 1], [5, 12], [7, 7]), options(true, Some(1), None));
    check(false, shape(1, [2, 1], [9, 9], [8, 8]), options(false, Some(4), None));
    check(false, shape(1, [3, 1], [6, 8], [8, 8]), options(true, None, Some(0.8)));
    check(true, shape(1, [3, 1], [6, 8], [8, 8]), options(true, Some(3), Some(0.8)));
}

#[test]
fn several_blocks_of_queries() {
    check(false, shape(1, [2, 1], [150, 171], [16, 16]), options(true, None, None));
    check(true, shape(1, [1, 1], [140, 140], [8, 8]), options(true, Some(33), None));
}

/// Rows of several documents; `lengths` are those of each row.
fn check_documents(gpus: bool, heads: [usize; 2], d: usize, lengths: &[Vec<usize>], o: AttentionOptions) {
    let t: usize = lengths[0].iter().sum();
    let batch = lengths.len();
    let starts_of = |lengths: &Vec<usize>| -> Vec<usize> {
        let begins = lengths.iter().scan(0, |sum, &n| Some(std::mem::replace(sum, *sum + n)));
        begins.zip(lengths).flat_map(|(begin, &n)| vec![begin; n]).collect()
    };
    let starts: Vec<Vec<usize>> = lengths.iter().map(starts_of).collect();
    let segments = Segments::new(batch, starts.iter().flatten().map(|&s| s as u32).collect());
    let shape = shape(batch, heads, [t, t], [d, d]);
    let (kv_heads, group) = (shape.kv_heads, shape.heads / shape.kv_heads);
    let window = o.window;
    // Row by row: a rule knows no rows.
    let of = |x: &[Vec<f64>], starts: &dyn Fn(usize, usize) -> usize| -> Vec<f64> {
        let row = Shape { batch: 1, ..shape.clone() };
        let one = |b: usize| {
            let x: Vec<Vec<f64>> =
                x.iter().map(|x| x[b * x.len() / batch..(b + 1) * x.len() / batch].to_vec()).collect();
            let sees = |p: usize, j: usize| j <= p && window.is_none_or(|w| p - j < w) && j >= starts(b, p);
            let rule = Rule { position: &|i| i, sees: &sees, kv_head: &|h| h / group };
            reference(&x, &row, &o, &rule)
        };
        (0..batch).flat_map(one).collect()
    };
    let case = Case {
        name: format!("attention on documents {lengths:?} {o:?}"),
        inputs: vec![
            normal("q", batch * shape.heads * t * d),
            normal("k", batch * kv_heads * t * d),
            normal("v", batch * kv_heads * t * d),
        ],
        op: &|x| {
            let [q, k, v] = x.try_into().expect("three inputs");
            let split = |x: Tensor<1>, heads: usize| x.reshape([batch, heads, t, d]);
            let (q, k, v) = (split(q, shape.heads), split(k, kv_heads), split(v, kv_heads));
            segmented_attention(q, k, v, segments.clone(), o.clone()).reshape([batch * shape.heads * t * d])
        },
        reference: &|x| of(x, &|b, p| starts[b][p]),
    };
    for device in devices_and(gpus) {
        case.check(&device, of_products(&device, 3e-6), Some(1e-6));
        case.refutes(&device, &|x| of(x, &|_, _| 0));
        case.refutes(&device, &|x| of(x, &|b, p| starts[b][p].saturating_sub(1)));
        if batch > 1 {
            case.refutes(&device, &|x| of(x, &|b, p| starts[(b + 1) % batch][p]));
        }
    }
}

#[test]
fn documents_of_a_row_do_not_see_each_other() {
    check_documents(true, [6, 2], 8, &[vec![4, 1, 7], vec![2, 10]], options(true, None, None));
    check_documents(false, [2, 1], 5, &[vec![3, 6]], options(true, Some(3), Some(0.8)));
    check_documents(false, [1, 1], 4, &[vec![100, 33, 40]], options(true, None, None));
}

#[test]
fn one_document_a_row_is_plain_attention() {
    let x =
        |name: &str| flat(&normal(name, 2 * 3 * 9 * 4), &Device::flex(), DType::F32).reshape([2, 3, 9, 4]);
    let o = options(true, None, None);
    let whole = Segments::new(2, vec![0; 18]);
    let (plain, one) =
        (attention(x("q"), x("k"), x("v"), o.clone()), segmented_attention(x("q"), x("k"), x("v"), whole, o));
    assert_eq!(plain.into_data(), one.into_data(), "bit for bit");
    let positions: Vec<usize> = Segments::new(2, vec![0, 0, 2, 0, 1, 1]).positions().collect();
    assert_eq!(positions, [0, 1, 0, 0, 0, 1]);
}

#[test]
#[should_panic(expected = "a document begins in no token of its own")]
fn a_document_that_begins_inside_another_is_refused() {
    Segments::new(1, vec![0, 0, 1]);
}

#[test]
fn reads_transposed_heads_and_a_single_step_like_the_whole() {
    for device in devices() {
        let (b, heads, kv, t, d) = (2, 6, 2, 9, 8);
        let view = |name: &str, heads: usize| {
            flat(&normal(name, b * t * heads * d), &device, DType::F32)
                .reshape([b, t, heads, d])
                .swap_dims(1, 2)
        };
        let (q, k, v) = (view("q", heads), view("k", kv), view("v", kv));
        let o = options(true, None, None);
        let n = b * heads * t * d;
        let whole = attention(q.clone(), k.clone(), v.clone(), o.clone());
        let copy = |x: Tensor<4>| {
            let (shape, n) = (x.dims(), x.shape().num_elements());
            x.reshape([n]).reshape(shape)
        };
        let copied = attention(copy(q.clone()), copy(k.clone()), copy(v.clone()), o.clone());
        let e = super::support::error(&host(whole.clone().reshape([n])), &host(copied.reshape([n])));
        assert!(e < 1e-6, "views are off by {e:e} on {device:?}");
        let step = attention(q.narrow(2, t - 1, 1), k, v, o);
        let last = whole.narrow(2, t - 1, 1);
        let e = super::support::error(&host(step.reshape([n / t])), &host(last.reshape([n / t])));
        assert!(e < 2e-6, "the last token alone is off by {e:e} on {device:?}");
    }
}

#[test]
#[should_panic(expected = "soft cap Some(0.0)")]
fn a_soft_cap_of_zero_is_refused() {
    let x = || Tensor::zeros([1, 1, 2, 4], &Device::flex());
    attention(x(), x(), x(), options(true, None, Some(0.0)));
}
