//! A mixture-of-experts layer in plain `f64` loops over tokens and their experts.

/// Extents and weights of one layer and its input.
#[derive(Clone)]
pub struct Reference {
    pub tokens: usize,
    pub d: usize,
    pub f: usize,
    pub experts: usize,
    pub top_k: usize,
    pub renormalise: bool,
    /// `[tokens, d]`.
    pub x: Vec<f64>,
    /// `[d, experts]`.
    pub router: Vec<f64>,
    /// `[experts, d, f]`.
    pub gate: Vec<f64>,
    /// `[experts, d, f]`.
    pub up: Vec<f64>,
    /// `[experts, f, d]`.
    pub down: Vec<f64>,
}

impl Reference {
    /// The output `[tokens, d]`.
    pub fn forward(&self) -> Vec<f64> {
        let Reference { tokens, d, f, experts, top_k, .. } = *self;
        let mut y = vec![0.0; tokens * d];
        for t in 0..tokens {
            let x = &self.x[t * d..][..d];
            let score = |e: usize| (0..d).map(|i| x[i] * self.router[i * experts + e]).sum::<f64>().exp();
            let scores: Vec<f64> = (0..experts).map(score).collect();
            let mut best: Vec<usize> = (0..experts).collect();
            best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let best = &best[..top_k];
            let over: f64 = match self.renormalise {
                true => best.iter().map(|&e| scores[e]).sum(),
                false => scores.iter().sum(),
            };
            for &e in best {
                for j in 0..f {
                    let product = |w: &[f64]| (0..d).map(|i| x[i] * w[(e * d + i) * f + j]).sum::<f64>();
                    let (gate, up) = (product(&self.gate), product(&self.up));
                    let hidden = gate / (1.0 + (-gate).exp()) * up * scores[e] / over;
                    for i in 0..d {
                        y[t * d + i] += hidden * self.down[(e * f + j) * d + i];
                    }
                }
            }
        }
        y
    }
}
