//! The last stage: every variant on every domain's held-out text.

use anyhow::Result;
use burn::module::Module;
use firebrick_core::Brick;
use firebrick_models::{Decoder, ModelFiles};
use firebrick_moe::AdapterRouter;
use firebrick_peft::LoraBank;

use super::pipeline::{Domain, Pipeline};
use super::results::Variant;

impl Pipeline<'_> {
    /// Held-out perplexity of every variant.
    pub(super) fn evaluate(&self, decoder: &Decoder, banks: &[LoraBank]) -> Result<Vec<Variant>> {
        let base = decoder.valid();
        let shape = |layers: usize| {
            let linears = self.files.sites().block_linears();
            let weights: usize = linears
                .iter()
                .filter(|s| s.layer.is_some_and(|l| l < layers))
                .filter_map(|s| self.files.sites().linear(s))
                .map(|(a, b)| a * b)
                .sum();
            weights as u64
        };
        let layers = self.files.config.layers;
        let variant = |name: &str, bytes: Option<u64>, nll: Vec<Option<f64>>| Variant {
            name: name.into(),
            perplexity: nll.into_iter().map(|v| v.map(f64::exp)).collect(),
            bytes,
        };
        let everywhere = |nll: Vec<f64>| nll.into_iter().map(Some).collect::<Vec<_>>();
        let measure = |name: &str, bytes: Option<u64>, decoder: &Decoder, bricks: &[&dyn Brick]| {
            self.stages.once(&format!("evaluate-{}", name.replace(' ', "-")), || {
                self.say(&format!("evaluate: {name}"));
                Ok(variant(name, bytes, everywhere(self.held_out(decoder, bricks)?)))
            })
        };
        let mut variants = vec![measure("base", Some(4 * shape(layers)), &base, &[])?];
        let specialists = self.stages.once("evaluate-specialists", || {
            self.say("evaluate: every adapter");
            let mut rows = Vec::new();
            for (i, (bank, domain)) in banks.iter().zip(&self.domains).enumerate() {
                // On its own the bank answers to no router.
                let bricks: [&dyn Brick; 1] = [bank];
                let one = |(j, d): (usize, &Domain)| {
                    let measured = i == j || self.settings.thorough;
                    measured
                        .then(|| self.nll(&base, &bricks, &d.held.ids, self.settings.eval_tokens))
                        .transpose()
                };
                let nll: Vec<Option<f64>> =
                    self.domains.iter().enumerate().map(one).collect::<Result<_>>()?;
                rows.push(variant(&format!("adapter {}", domain.name), None, nll));
            }
            Ok(rows)
        })?;
        variants.extend(specialists);
        let (router, _) = AdapterRouter::load(&self.out.join("router"), &self.inner)?;
        let mut mixture: Vec<&dyn Brick> = banks.iter().map(|b| b as &dyn Brick).collect();
        mixture.push(&router);
        variants.push(measure("routed adapters", None, &base, &mixture)?);
        let merged = self.written("merged", &self.inner)?;
        variants.push(measure("merged", Some(4 * shape(layers)), &merged.decoder, &[])?);
        let gguf = self.written("model.gguf", &self.inner)?;
        let files = ModelFiles::open(&self.out.join("model.gguf"))?;
        let matrices =
            files.checkpoint.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.shape.len() == 2);
        let bytes = matrices.map(|t| t.len as u64).sum();
        variants.push(measure("quantized (GGUF)", Some(bytes), &gguf.decoder, &[])?);
        let student = self.written("student", &self.inner)?;
        let kept = student.decoder.config().layers;
        variants.push(measure("student", Some(4 * shape(kept)), &student.decoder, &[])?);
        Ok(variants)
    }
}
