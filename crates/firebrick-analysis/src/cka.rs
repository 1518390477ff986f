//! Centred kernel alignment: how alike the representations of two layers are, up to rotation and scale (Kornblith et al. 2019,
//! arXiv:1905.00414), with the unbiased estimate over minibatches of Nguyen et al. 2021 (arXiv:2010.15327).

use burn::tensor::Tensor;
use firebrick_core::{Progress, Run, Site, Task};
use firebrick_models::{Decoder, token_tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::sample::{read, spread, tokens_at};

/// A dependence below this share of the squared energy is rounding.
const FLAT: f64 = 1e-20;

/// Fewest tokens of a minibatch: the estimate divides by `n (n - 3)`.
const LEAST: usize = 4;

/// Products of the tokens of a few minibatches with each other, at the residual stream before the first layer and after each.
///
/// `4 tokens^2` bytes for each layer and minibatch.
#[derive(Clone, Debug, Default)]
pub struct LayerGrams {
    layers: Vec<Vec<Gram>>,
}

/// `X X^T` without its diagonal, and what is summed of it again and again.
#[derive(Clone, Debug)]
struct Gram {
    n: usize,
    values: Vec<f32>,
    row_sums: Vec<f64>,
    sum: f64,
    /// Mean square length of the tokens before they were centred.
    energy: f64,
}

/// Alignment of every layer with every layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Similarity {
    /// Tokens of each minibatch.
    pub tokens: usize,
    /// Minibatches averaged over.
    pub batches: usize,
    /// `cka[i][j]`: layer `i` of the first model, layer `j` of the second; 0 is the embedding, `l + 1` the output of layer `l`. About 0
    /// for unrelated ones (a little below is possible), 1 for equal ones; `None` where a representation does not vary.
    pub cka: Vec<Vec<Option<f64>>>,
}

/// Which tokens [`layer_grams`] looks at.
#[derive(Clone, Debug, PartialEq)]
pub struct SimilarityOptions {
    /// Tokens per window; each is a text of its own.
    pub window: usize,
    /// Windows per minibatch.
    pub windows: usize,
    /// Tokens of a minibatch, evenly spread over its windows.
    pub tokens: usize,
    /// At most so many minibatches, from the start of the text.
    pub batches: usize,
    /// Leaves the first token of each window out: its activations are of another magnitude and would decide alone.
    pub skip_first_token: bool,
}

impl Default for SimilarityOptions {
    fn default() -> Self {
        SimilarityOptions { window: 256, windows: 4, tokens: 256, batches: 8, skip_first_token: true }
    }
}

impl Gram {
    /// Of the products `[n, n]` of `n` tokens, row-major.
    fn new(n: usize, products: Vec<f32>, energy: f64) -> Self {
        let mut values = products;
        (0..n).for_each(|i| values[i * n + i] = 0.0);
        let row_sums: Vec<f64> = values.chunks(n).map(|r| r.iter().map(|v| f64::from(*v)).sum()).collect();
        Gram { n, sum: row_sums.iter().sum(), row_sums, values, energy }
    }

    /// `HSIC_1` (Song et al. 2012): the unbiased estimate of the dependence of the two.
    fn hsic(&self, other: &Gram) -> f64 {
        let n = self.n as f64;
        // The diagonals are 0 and both are symmetric: tr(KL) is the sum of the products of their entries.
        let trace: f64 =
            self.values.iter().zip(&other.values).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let rows: f64 = self.row_sums.iter().zip(&other.row_sums).map(|(a, b)| a * b).sum();
        let sums = self.sum * other.sum / ((n - 1.0) * (n - 2.0));
        (trace + sums - 2.0 / (n - 2.0) * rows) / (n * (n - 3.0))
    }
}

impl LayerGrams {
    /// Adds a minibatch at the representation number `layer`: `x: [tokens, d]`, at least 4 tokens.
    ///
    /// # Errors
    /// [`AnalysisError::Site`] if a number is not finite or cannot be read.
    pub(crate) fn add(&mut self, layer: usize, site: Site, x: Tensor<2>) -> Result<(), AnalysisError> {
        let n = x.dims()[0];
        let energy =
            read(site, (x.clone() * x.clone()).sum_dim(1))?.iter().map(|v| f64::from(*v)).sum::<f64>();
        // The estimate does not see a common offset; taking it off first saves the digits it would cost.
        let x = x.clone() - x.mean_dim(0);
        let products = read(site, x.clone().matmul(x.transpose()))?;
        if products.iter().any(|v| !v.is_finite()) {
            return Err(AnalysisError::Site { site, what: "the residual stream is not finite".into() });
        }
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, Vec::new());
        }
        self.layers[layer].push(Gram::new(n, products, energy / n as f64));
        Ok(())
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    fn minibatches(&self) -> Vec<usize> {
        self.layers.first().map_or(Vec::new(), |grams| grams.iter().map(|g| g.n).collect())
    }
}

/// Alignment of every layer of `a` with every layer of `b`, both taken on the same tokens (of one model: give it twice).
///
/// Numerator and denominators are unbiased on each minibatch and averaged before they are divided.
///
/// # Errors
/// [`AnalysisError::Options`] if the two hold other minibatches, or none.
pub fn cka(a: &LayerGrams, b: &LayerGrams) -> Result<Similarity, AnalysisError> {
    let batches = a.minibatches();
    if batches.is_empty() || batches != b.minibatches() {
        let problem = format!("minibatches of {:?} tokens against {:?}", batches, b.minibatches());
        return Err(AnalysisError::Options { problems: vec![problem] });
    }
    let mean = |x: &[Gram], y: &[Gram]| x.iter().zip(y).map(|(x, y)| x.hsic(y)).sum::<f64>();
    let own = |grams: &LayerGrams| -> Vec<f64> {
        let one = |g: &Vec<Gram>| {
            let (own, energy) = (mean(g, g), g.iter().map(|g| g.energy * g.energy).sum::<f64>());
            if own > FLAT * energy { own } else { 0.0 }
        };
        grams.layers.par_iter().map(one).collect()
    };
    let (own_a, own_b) = (own(a), own(b));
    let row = |i: usize| -> Vec<Option<f64>> {
        let entry = |j: usize| {
            let scale = own_a[i] * own_b[j];
            let fine = own_a[i] > 0.0 && own_b[j] > 0.0;
            fine.then(|| mean(&a.layers[i], &b.layers[j]) / scale.sqrt()).filter(|v| v.is_finite())
        };
        (0..b.layers.len()).map(entry).collect()
    };
    let cka = (0..a.layers.len()).into_par_iter().map(row).collect();
    Ok(Similarity { tokens: batches[0], batches: batches.len(), cka })
}

/// Runs the text `ids` through `decoder` and keeps what [`cka`] needs of the residual stream.
///
/// # Errors
/// Too short a text, a residual stream that is not finite, and [`AnalysisError::Cancelled`].
pub fn layer_grams(
    decoder: &Decoder,
    ids: &[u32],
    options: &SimilarityOptions,
    progress: &dyn Progress,
) -> Result<LayerGrams, AnalysisError> {
    let windows: Vec<&[u32]> = ids.chunks_exact(options.window.max(1)).collect();
    let batches: Vec<&[&[u32]]> = windows.chunks(options.windows.max(1)).take(options.batches).collect();
    let need = LEAST + usize::from(options.skip_first_token);
    if batches.is_empty() || options.window < need || options.tokens < LEAST {
        return Err(AnalysisError::TooFewTokens { have: ids.len().min(options.window), need });
    }
    let mut task = Task::begin(progress, "similarity", Some(batches.len() as u64), "minibatches");
    let mut grams = LayerGrams::default();
    for batch in batches {
        let tokens = token_tensor(batch, &decoder.device());
        let mut x = decoder.embed(tokens, &mut Run::default());
        grams.see(0, &x, options.skip_first_token, options.tokens)?;
        for layer in 0..decoder.sites().layers() {
            x = decoder.block(layer, x, &mut Run::default());
            grams.see(layer + 1, &x, options.skip_first_token, options.tokens)?;
        }
        task.advance(1, "")?;
    }
    Ok(grams)
}

impl LayerGrams {
    /// Adds evenly spread tokens of the residual stream `x: [windows, tokens, d_model]` as one minibatch, if there are enough.
    pub(crate) fn see(
        &mut self,
        layer: usize,
        x: &Tensor<3>,
        skip_first: bool,
        tokens: usize,
    ) -> Result<(), AnalysisError> {
        let [windows, length, d] = x.dims();
        let positions = spread(usize::from(skip_first), length, tokens.div_ceil(windows.max(1)));
        let n = windows * positions.len();
        if n < LEAST {
            return Ok(());
        }
        let site = match layer {
            0 => Site::global(firebrick_core::Part::Embed),
            l => Site::layer(l - 1, firebrick_core::Part::Block),
        };
        self.add(layer, site, tokens_at(&x.clone().without_autodiff(), &positions).reshape([n, d]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::{Part, Seed};
    use firebrick_tensor::linalg::{Matrix, qr};

    fn add(grams: &mut LayerGrams, layer: usize, x: &Matrix) {
        let data = TensorData::new(x.to_f32(), [x.rows(), x.cols()]);
        grams.add(layer, Site::layer(layer, Part::Block), Tensor::from_data(data, &Device::flex())).unwrap();
    }

    fn normal(rows: usize, cols: usize, seed: u64, name: &str) -> Matrix {
        Matrix::random_normal(rows, cols, Seed(seed), name)
    }

    #[test]
    fn rotations_and_scales_change_nothing_and_strangers_are_at_0() {
        let (n, p) = (64, 96);
        let (mut a, mut b) = (LayerGrams::default(), LayerGrams::default());
        let rotation = qr(&normal(p, p, 1, "q")).unwrap().q;
        let mut strangers = 0.0;
        for batch in 0..6 {
            let x = normal(n, p, batch, "x");
            let rotated = x.matmul(&rotation).unwrap();
            let y = normal(n, p, batch, "y");
            add(&mut a, 0, &x);
            add(&mut b, 0, &Matrix::from_fn(n, p, |i, j| 3.0 * rotated[(i, j)]));
            add(&mut b, 1, &y);
            // Per-feature scales do count.
            add(&mut b, 2, &Matrix::from_fn(n, p, |i, j| x[(i, j)] * if j < 3 { 30.0 } else { 1.0 }));
            strangers += biased(&x, &y) / 6.0;
        }
        let found = cka(&a, &b).unwrap();
        assert_eq!((found.tokens, found.batches), (n, 6));
        let row: Vec<f64> = found.cka[0].iter().map(|v| v.unwrap()).collect();
        assert!((row[0] - 1.0).abs() < 1e-5, "{row:?}");
        assert!(row[1].abs() < 0.05, "{row:?}");
        assert!(row[2] < 0.5, "{row:?}");
        // Negative control: the biased estimate calls strangers alike, p / (n + p) or so.
        assert!(strangers > 0.5, "{strangers}");
        let own = cka(&b, &b).unwrap();
        assert!((0..3).all(|i| (own.cka[i][i].unwrap() - 1.0).abs() < 1e-12));
        assert!((0..3).all(|i| (0..3).all(|j| own.cka[i][j] == own.cka[j][i])));
    }

    /// `|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F)` of centred columns.
    fn biased(x: &Matrix, y: &Matrix) -> f64 {
        let centred = |m: &Matrix| {
            let mean = |j: usize| (0..m.rows()).map(|i| m[(i, j)]).sum::<f64>() / m.rows() as f64;
            Matrix::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)] - mean(j))
        };
        let (x, y) = (centred(x), centred(y));
        let square = |a: &Matrix, b: &Matrix| {
            a.transpose().matmul(b).unwrap().data().iter().map(|v| v * v).sum::<f64>()
        };
        square(&x, &y) / (square(&x, &x) * square(&y, &y)).sqrt()
    }

    #[test]
    fn hsic_is_its_definition_and_has_no_bias() {
        let n = 12;
        let (x, y) = (normal(n, 3, 5, "x"), normal(n, 2, 5, "y"));
        let gram = |m: &Matrix| m.matmul(&m.transpose()).unwrap();
        let (k, l) = (gram(&x), gram(&y));
        // Over distinct quadruples, as the estimate is defined.
        let (mut sum, mut count) = (0.0, 0.0);
        for i in 0..n {
            for j in (0..n).filter(|j| *j != i) {
                for q in (0..n).filter(|q| *q != i && *q != j) {
                    for r in (0..n).filter(|r| ![i, j, q].contains(r)) {
                        sum += k[(i, j)] * (l[(i, j)] + l[(q, r)] - 2.0 * l[(i, q)]);
                        count += 1.0;
                    }
                }
            }
        }
        let gram = |m: &Matrix| Gram::new(n, m.to_f32(), 1.0);
        let found = gram(&k).hsic(&gram(&l));
        assert!((found - sum / count).abs() < 1e-5, "{found} {}", sum / count);
        // Over many draws of strangers it averages to 0; the plain tr(KL) does not come near.
        let (mut mean, mut plain) = (0.0, 0.0);
        for seed in 0..400 {
            let (x, y) = (normal(n, 3, seed, "a"), normal(n, 2, seed, "b"));
            let (k, l) = (x.matmul(&x.transpose()).unwrap(), y.matmul(&y.transpose()).unwrap());
            mean += gram(&k).hsic(&gram(&l)) / 400.0;
            plain += k.data().iter().zip(l.data()).map(|(a, b)| a * b).sum::<f64>() / (n * n) as f64 / 400.0;
        }
        assert!(mean.abs() < 0.05 && plain > 0.4, "{mean} {plain}");
    }

    #[test]
    fn other_minibatches_cannot_be_compared() {
        let (mut a, mut b) = (LayerGrams::default(), LayerGrams::default());
        add(&mut a, 0, &normal(8, 3, 1, "x"));
        add(&mut b, 0, &normal(9, 3, 1, "x"));
        assert!(matches!(cka(&a, &b), Err(AnalysisError::Options { .. })));
        assert!(cka(&LayerGrams::default(), &LayerGrams::default()).is_err());
        // A representation that does not vary has no alignment.
        add(&mut a, 1, &Matrix::from_fn(8, 3, |_, j| j as f64));
        assert_eq!(cka(&a, &a).unwrap().cka[0][1], None);
    }
}
