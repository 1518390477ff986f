use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Base, Brick, Mode, Part, Run, Seed, Site};
use firebrick_moe::{Balance, ExpertLoads, MoeLayer, RouterConfig, TopKRouter};
use firebrick_train::AdamW;

const D: usize = 10;
const TOKENS: usize = 128;

/// Tokens `[1, TOKENS, D]` of two domains in turn and their targets: a constant, the domain as ±1, and noise, which one
/// domain keeps and the other reverses.
fn draw(step: usize, device: &Device) -> [Tensor<3>; 2] {
    let mut x = Seed(5).normal(&format!("task/{step}"), TOKENS * D, 1.0);
    let mut y = vec![0.0; x.len()];
    for t in 0..TOKENS {
        let domain = if t % 2 == 0 { 1.0 } else { -1.0 };
        (x[t * D], x[t * D + 1]) = (1.0, domain);
        (2..D).for_each(|i| y[t * D + i] = domain * x[t * D + i]);
    }
    [x, y].map(|values| Tensor::from_data(TensorData::new(values, [1, TOKENS, D]), device))
}

/// First loss, mean of the last ten, and the variation of the loads over those, for two experts of which the first has
/// every token at first.
fn train(alpha: f64) -> [f64; 3] {
    let (site, device) = (Site::layer(0, Part::Mlp), Device::flex().autodiff());
    let random = MoeLayer::random(&[0], D, 16, &RouterConfig::new(2, 1, false), Seed(1), &device).unwrap();
    let (_, router, bank) = random.parts().next().unwrap();
    let mut weight = vec![0.0; D * 2];
    weight[0] = 1.0;
    let weight = Tensor::from_data(TensorData::new(weight, [D, 2]), &device);
    let router = TopKRouter::from_weight(weight, router.config().clone()).unwrap();
    let mut layer = MoeLayer::from_parts(vec![(0, router, bank.clone())]).unwrap();
    layer = layer.with_balance(Balance { alpha, ..Balance::default() });
    let mut optimizer = AdamW::default();
    optimizer.weight_decay = 0.0;
    let (mut losses, mut loads) = (Vec::new(), ExpertLoads::default());
    let steps = 200;
    for step in 0..steps {
        let [x, y] = draw(step, &device);
        let mut run = Run::default();
        run.mode = Mode::Train;
        let base: &mut Base<'_> = &mut |x, _| x;
        let error = (layer.at(site, x, base, &mut run) - y).square().mean();
        losses.push(error.clone().without_autodiff().into_scalar::<f32>() as f64);
        if step >= steps - 10 {
            let counts: Vec<usize> =
                run.get::<ExpertLoads>().unwrap().counts[&0].iter().map(|n| *n as usize).collect();
            loads.add(0, &counts);
        }
        let loss = run.total_loss().map_or(error.clone(), |aux| error + aux);
        let gradients = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(0.02, layer, gradients);
    }
    let last = losses[steps - 10..].iter().sum::<f64>() / 10.0;
    [losses[0], last, loads.variation(0).unwrap()]
}

#[test]
fn two_experts_share_two_domains_only_with_the_balance_loss() {
    let [first, last, variation] = train(0.1);
    let [_, alone, collapsed] = train(0.0);
    let figures = format!("loss {first} -> {last}, variation {variation}; without {alone}, {collapsed}");
    assert!(last < 0.2 * first, "{figures}");
    assert!(variation < 0.3, "{figures}");
    assert!(collapsed > 0.9, "{figures}");
}
