use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Brick, Mode, Part, Run, Seed, Site};
use firebrick_moe::{
    AuxNorm, Balance, Dispatch, ExpertBank, ExpertLoads, ExpertTap, MoeLayer, RouterConfig, TopKRouter,
    switch_balance_loss,
};
use firebrick_tensor::ops::swiglu;

use crate::reference::Reference;

const SITE: Site = Site { layer: Some(0), part: Part::Mlp, expert: None };
const BOTH: [Dispatch; 2] = [Dispatch::Grouped, Dispatch::Loop];

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| *v as f64).collect()
}

fn host<const D: usize>(t: Tensor<D>) -> Vec<f64> {
    t.without_autodiff().into_data().iter::<f64>().collect()
}

fn tensor<const D: usize>(values: &[f64], dims: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}

/// Random weights and input; router scores have a standard deviation of about 1.
fn random(dims: [usize; 5], renormalise: bool, seed: u64) -> Reference {
    let [tokens, d, f, experts, top_k] = dims;
    let draw = |name: &str, n: usize, std: f64| to_f64(&Seed(seed).normal(name, n, std));
    let (inner, outer) = ((d as f64).powf(-0.5), (f as f64).powf(-0.5));
    Reference {
        tokens,
        d,
        f,
        experts,
        top_k,
        renormalise,
        x: draw("x", tokens * d, 1.0),
        router: draw("router", d * experts, inner),
        gate: draw("gate", experts * d * f, inner),
        up: draw("up", experts * d * f, inner),
        down: draw("down", experts * f * d, outer),
    }
}

fn layer(r: &Reference, device: &Device) -> MoeLayer {
    let config = RouterConfig::new(r.experts, r.top_k, r.renormalise);
    let router = TopKRouter::from_weight(tensor(&r.router, [r.d, r.experts], device), config).unwrap();
    let stack = |w: &[f64], d_in, d_out| {
        burn::module::Param::from_tensor(tensor(w, [r.experts, d_in, d_out], device))
    };
    let (gate, up, down) = (stack(&r.gate, r.d, r.f), stack(&r.up, r.d, r.f), stack(&r.down, r.f, r.d));
    MoeLayer::from_parts(vec![(0, router, ExpertBank { gate, up, down })]).unwrap()
}

fn pass(layer: &MoeLayer, x: Tensor<2>, run: &mut Run<'_>) -> Tensor<2> {
    let dims = x.dims();
    let y = layer.at(SITE, x.unsqueeze_dim(0), &mut |_, _| panic!("the base is replaced"), run);
    y.reshape(dims)
}

fn output(r: &Reference, dispatch: Dispatch) -> Vec<f64> {
    let device = Device::flex();
    let layer = layer(r, &device).with_dispatch(dispatch);
    host(pass(&layer, tensor(&r.x, [r.tokens, r.d], &device), &mut Run::default()))
}

/// The largest distance of two lists, over the largest entry of the second.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let scale = b.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(1e-30);
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale
}

/// Gradients of `sum(y * r)` for input, router, gate, up and down.
fn gradients(r: &Reference, dispatch: Dispatch) -> [Vec<f64>; 5] {
    let device = Device::flex().autodiff();
    let layer = layer(r, &device).with_dispatch(dispatch);
    let x = tensor(&r.x, [r.tokens, r.d], &device).require_grad();
    let y = pass(&layer, x.clone(), &mut Run::default());
    let grads = (y * tensor(&cotangent(r), [r.tokens, r.d], &device)).sum().backward();
    let (_, router, bank) = layer.parts().next().unwrap();
    let of = |w: &burn::module::Param<Tensor<3>>| host(w.val().grad(&grads).unwrap());
    let router = host(router.weight.val().grad(&grads).unwrap());
    [host(x.grad(&grads).unwrap()), router, of(&bank.gate), of(&bank.up), of(&bank.down)]
}

fn cotangent(r: &Reference) -> Vec<f64> {
    to_f64(&Seed(77).normal("cotangent", r.tokens * r.d, 1.0))
}

/// Dense SwiGLU with the weights of expert 0.
fn dense(r: &Reference) -> Vec<f64> {
    let device = Device::flex();
    let of = |w: &[f64], d_in: usize, d_out: usize| tensor(&w[..d_in * d_out], [d_in, d_out], &device);
    let x = tensor(&r.x, [r.tokens, r.d], &device);
    let (gate, up) = (x.clone().matmul(of(&r.gate, r.d, r.f)), x.matmul(of(&r.up, r.d, r.f)));
    host(swiglu(gate, up).matmul(of(&r.down, r.f, r.d)))
}

fn largest_gap(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn one_expert_is_the_dense_network() {
    let r = random([33, 16, 24, 1, 1], false, 1);
    for dispatch in BOTH {
        assert!(largest_gap(&output(&r, dispatch), &dense(&r)) < 1e-5);
    }
}

#[test]
fn identical_experts_are_the_dense_network_if_weights_sum_to_1() {
    let mut r = random([33, 16, 24, 5, 2], true, 2);
    for (w, n) in [(&mut r.gate, 16 * 24), (&mut r.up, 16 * 24), (&mut r.down, 24 * 16)] {
        *w = w[..n].repeat(5);
    }
    let plain = Reference { renormalise: false, ..r.clone() };
    for dispatch in BOTH {
        assert!(largest_gap(&output(&r, dispatch), &dense(&r)) < 1e-5);
        assert!(largest_gap(&output(&plain, dispatch), &dense(&r)) > 1e-2);
    }
}

#[test]
fn both_ways_equal_the_reference() {
    for (dims, renormalise) in [
        ([1, 8, 12, 4, 2], true),
        ([40, 12, 20, 6, 3], false),
        ([17, 8, 8, 3, 3], true),
        ([9, 8, 8, 4, 1], false),
    ] {
        let r = random(dims, renormalise, 3);
        for dispatch in BOTH {
            assert!(distance(&output(&r, dispatch), &r.forward()) < 1e-5, "{dims:?} {dispatch:?}");
        }
        let other = Reference { top_k: if r.top_k == 1 { 2 } else { r.top_k - 1 }, ..r.clone() };
        assert!(distance(&other.forward(), &r.forward()) > 1e-3, "{dims:?}");
    }
}

#[test]
fn gradients_equal_finite_differences_of_the_reference() {
    let r = random([6, 5, 4, 4, 2], true, 4);
    for renormalise in [true, false] {
        let r = Reference { renormalise, ..r.clone() };
        let loss = |r: &Reference| r.forward().iter().zip(cotangent(r)).map(|(y, c)| y * c).sum::<f64>();
        let got = gradients(&r, Dispatch::Grouped);
        for (which, got) in got.iter().enumerate() {
            let part = |r: &mut Reference, i: usize, by: f64| {
                let list =
                    [&mut r.x, &mut r.router, &mut r.gate, &mut r.up, &mut r.down].into_iter().nth(which);
                list.unwrap()[i] += by;
            };
            let difference = |i: usize| {
                let (mut below, mut above) = (r.clone(), r.clone());
                part(&mut below, i, -1e-6);
                part(&mut above, i, 1e-6);
                (loss(&above) - loss(&below)) / 2e-6
            };
            let want: Vec<f64> = (0..got.len()).map(difference).collect();
            assert!(distance(got, &want) < 1e-4, "gradient {which}: {}", distance(got, &want));
            assert!(want.iter().any(|v| v.abs() > 1e-3), "gradient {which} is not zero");
        }
    }
}

#[test]
fn sorted_rows_and_the_loop_agree_with_one_expert_empty_and_one_hot() {
    let mut r = random([257, 64, 96, 7, 3], true, 5);
    // A constant feature that keeps every token away from expert 2 and sends it to expert 4.
    r.x.chunks_mut(64).for_each(|row| row[0] = 1.0);
    r.router[..7].copy_from_slice(&[0.0, 0.0, -9.0, 0.0, 9.0, 0.0, 0.0]);
    let device = Device::flex();
    let mut run = Run::default();
    pass(&layer(&r, &device), tensor(&r.x, [257, 64], &device), &mut run);
    let counts = &run.get::<ExpertLoads>().unwrap().counts[&0];
    assert_eq!((counts[2], counts[4], counts.iter().sum::<u64>()), (0, 257, 3 * 257));

    assert!(distance(&output(&r, Dispatch::Grouped), &output(&r, Dispatch::Loop)) < 1e-5);
    let (sorted, looped) = (gradients(&r, Dispatch::Grouped), gradients(&r, Dispatch::Loop));
    for (which, (a, b)) in sorted.iter().zip(&looped).enumerate() {
        assert!(distance(a, b) < 1e-4, "gradient {which}: {}", distance(a, b));
    }
    let idle = 64 * 96;
    assert!(sorted[2][2 * idle..3 * idle].iter().all(|g| *g == 0.0), "no token, no gradient");

    let mut swapped = r.clone();
    for w in [&mut swapped.gate, &mut swapped.up, &mut swapped.down] {
        let (front, back) = w.split_at_mut(4 * idle);
        front[3 * idle..].swap_with_slice(&mut back[..idle]);
    }
    assert!(distance(&output(&swapped, Dispatch::Grouped), &output(&r, Dispatch::Loop)) > 1e-2);
}

#[test]
fn the_task_reaches_the_router() {
    for (top_k, renormalise) in [(1, false), (2, false), (2, true)] {
        let r = random([20, 8, 12, 4, top_k], renormalise, 6);
        let [_, router, ..] = gradients(&r, Dispatch::Grouped);
        assert!(router.iter().map(|g| g * g).sum::<f64>().sqrt() > 1e-2, "{top_k} {renormalise}");
    }
    // All experts renormalized and all alike: the weights cannot matter.
    let mut r = random([20, 8, 12, 3, 2], true, 6);
    for w in [&mut r.gate, &mut r.up, &mut r.down] {
        *w = w[..8 * 12].repeat(3);
    }
    let [_, router, ..] = gradients(&r, Dispatch::Grouped);
    assert!(router.iter().all(|g| g.abs() < 1e-4), "{router:?}");
}

#[test]
fn losses_are_added_in_training_and_averaged_over_layers() {
    let device = Device::flex();
    let r = random([50, 8, 12, 4, 2], true, 7);
    let second = random([50, 8, 12, 4, 2], true, 8);
    let parts = |r: &Reference, at: usize| {
        let layer = layer(r, &device);
        let (_, router, bank) = layer.parts().next().unwrap();
        (at, router.clone(), bank.clone())
    };
    let both = MoeLayer::from_parts(vec![parts(&second, 3), parts(&r, 0)]).unwrap();
    let balance = Balance { alpha: 0.5, norm: AuxNorm::PerToken, z: 0.25 };
    let both = both.with_balance(balance);
    let x = tensor(&r.x, [50, 8], &device);
    let in_mode = |mode| {
        let mut run = Run::default();
        run.mode = mode;
        for l in [0, 3] {
            both.at(Site::layer(l, Part::Mlp), x.clone().unsqueeze_dim(0), &mut |x, _| x, &mut run);
        }
        run
    };
    assert!(in_mode(Mode::Infer).losses().is_empty());
    let run = in_mode(Mode::Train);
    let names: Vec<&str> = run.losses().iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["balance", "z", "balance", "z"]);
    let counts = &run.get::<ExpertLoads>().unwrap().counts;
    let mut want = 0.0;
    for (layer, router, _) in both.parts() {
        let routing = router.route(x.clone(), Site::layer(layer, Part::Mlp), &run);
        let counts: Vec<usize> = counts[&layer].iter().map(|n| *n as usize).collect();
        let balance = switch_balance_loss(&routing.probs, &counts, AuxNorm::PerToken);
        want += 0.5 * balance.into_scalar::<f32>() as f64 / 2.0;
        want += 0.25 * firebrick_moe::router_z_loss(&routing.logits).into_scalar::<f32>() as f64 / 2.0;
    }
    let got = run.total_loss().unwrap().into_scalar::<f32>() as f64;
    assert!((got - want).abs() < 1e-5 * want, "{got} {want}");
}

#[test]
fn a_tap_counts_the_slots_of_every_pass() {
    let (r, block) = (random([12, 4, 6, 3, 2], true, 1), Site::layer(0, Part::Block));
    let (layer, tap) = (layer(&r, &Device::flex()), ExpertTap::new(&[block].into_iter().collect()));
    let bricks: [&dyn Brick; 2] = [&layer, &tap];
    let x = tensor(&r.x, [1, 12, 4], &Device::flex());
    let pass = |run: &mut Run<'_>| {
        run.at(block, x.clone(), &mut |x, run: &mut Run<'_>| run.at(SITE, x, &mut |_, _| panic!("replaced")));
    };
    // Two passes of one run, whose loads add up, and another run.
    let (mut twice, mut once) = (Run::new(&bricks), Run::new(&bricks));
    pass(&mut twice);
    pass(&mut twice);
    pass(&mut once);
    let found = &tap.read()[&0];
    let slots: Vec<f64> =
        once.get::<ExpertLoads>().unwrap().counts[&0].iter().map(|n| 3.0 * *n as f64).collect();
    assert_eq!((found.tokens, &found.weights), (36, &slots));
    assert_eq!(found.weights.iter().sum::<f64>(), 72.0, "top_k times the tokens");
    assert!(found.weights.iter().filter(|w| **w > 0.0).count() > 1, "control: not all to one");
}
