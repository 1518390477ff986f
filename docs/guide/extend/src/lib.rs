//! A gate on every attention head: `mixed_h * (1 + g_h)`, one trainable number per head.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use firebrick_core::{Base, Brick, Part, Run, Site, SiteSet};

/// Gates the heads of the layers it sits at; at zero it changes nothing.
#[derive(Module, Debug)]
pub struct HeadGate {
    /// One row of `[heads]` per layer, in the order of the sites.
    gates: Vec<Param<Tensor<1>>>,
    #[module(skip)]
    sites: SiteSet,
}

impl HeadGate {
    /// Gates for the attention of these layers of a model with `heads` query heads.
    pub fn new(layers: impl IntoIterator<Item = usize>, heads: usize, device: &Device) -> Self {
        // The input of attn.o is the concatenated heads.
        let sites: SiteSet = layers.into_iter().map(|l| Site::layer(l, Part::AttnO)).collect();
        let zeros = |_| Param::from_tensor(Tensor::zeros([heads], device));
        HeadGate { gates: sites.iter().map(zeros).collect(), sites }
    }
}

impl Brick for HeadGate {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let row = self.sites.iter().position(|s| s == site).expect("called at its own sites");
        let gate = self.gates[row].val() + 1.0;
        let [batch, tokens, width] = x.dims();
        let heads = gate.dims()[0];
        let x = x.reshape([batch, tokens, heads, width / heads]);
        let x = x * gate.reshape([1, 1, heads, 1]);
        base(x.reshape([batch, tokens, width]), run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Int;
    use firebrick_core::{Seed, Silent};
    use firebrick_models::{Decoder, DecoderConfig};
    use firebrick_train::{TextData, TrainConfig, fit};

    #[test]
    fn trains_on_the_first_four_layers() {
        let device = Device::flex().autodiff();
        let config = DecoderConfig { layers: 6, ..DecoderConfig::tiny(32) };
        let heads = config.heads;
        let decoder = Decoder::random(config, Seed(1), &device).unwrap();
        let gate = HeadGate::new(0..4, heads, &device);

        // At zero the gate is the identity.
        let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5]], &device);
        let bricks: [&dyn Brick; 1] = [&gate];
        let with = decoder.forward(tokens.clone(), &mut Run::new(&bricks)).into_data();
        let without = decoder.forward(tokens.clone(), &mut Run::default()).into_data();
        assert_eq!(with, without);

        let data = TextData::new((0..2000).map(|i| (i * i) % 32).collect(), 0);
        let settings = TrainConfig {
            steps: 20,
            batch: 4,
            window: 32,
            warmup: 2,
            learning_rate: 0.3,
            ..TrainConfig::default()
        };
        let loss = &mut |gate: &HeadGate, tokens: Tensor<2, Int>, _| {
            let bricks: [&dyn Brick; 1] = [gate];
            decoder.nll(tokens, &mut Run::new(&bricks)).mean()
        };
        let (gate, report) = fit(gate, &settings, &data, loss, &Silent, false).unwrap();
        assert!(report.final_loss() < report.first_loss(), "{report:?}");

        let bricks: [&dyn Brick; 1] = [&gate];
        let trained = decoder.forward(tokens, &mut Run::new(&bricks)).into_data();
        assert_ne!(trained, without, "control: the trained gate does something");
    }
}
