//! Evolution strategy with covariance matrix adaptation (Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772).

use firebrick_core::Seed;
use firebrick_tensor::linalg::{Matrix, symmetric_eigen};
use serde::{Deserialize, Serialize};

use crate::MergeError;

/// Above so many dimensions [`Covariance::Auto`] is diagonal.
const FULL_UP_TO: usize = 200;

/// Which covariance is adapted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Covariance {
    /// Full up to 200 dimensions, diagonal above.
    #[default]
    Auto,
    /// All of it: time and memory `n^2` a point, and an eigendecomposition each generation.
    Full,
    /// Its diagonal (sep-CMA-ES, Ros and Hansen 2008), which learns faster, but no rotation.
    Diagonal,
}

/// Settings of [`CmaEs`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CmaEsConfig {
    /// Standard deviation of the first generation.
    pub sigma: f64,
    /// Points of a generation; none for `4 + floor(3 ln n)`.
    pub population: Option<usize>,
    /// Which covariance.
    pub covariance: Covariance,
    /// Seed of all draws.
    pub seed: Seed,
}

impl Default for CmaEsConfig {
    fn default() -> Self {
        CmaEsConfig { sigma: 1.0 / 6.0, population: None, covariance: Covariance::Auto, seed: Seed(0) }
    }
}

/// The state of a minimization: [`CmaEs::ask`] for the points of a generation, [`CmaEs::tell`] their costs.
///
/// A generation is a function of this state, which serde writes whole, so that a run goes on as if it had not stopped.
///
/// ```
/// use firebrick_merge::learned::{CmaEs, CmaEsConfig};
/// let mut search = CmaEs::new(vec![3.0, -2.0], CmaEsConfig { sigma: 1.0, ..CmaEsConfig::default() })?;
/// for _ in 0..100 {
///     let points = search.ask()?;
///     let costs: Vec<f64> = points.iter().map(|x| x.iter().map(|v| v * v).sum()).collect();
///     search.tell(&points, &costs)?;
/// }
/// assert!(search.mean().iter().all(|v| v.abs() < 1e-6));
/// # Ok::<(), firebrick_merge::MergeError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CmaEs {
    config: CmaEsConfig,
    generation: u64,
    mean: Vec<f64>,
    sigma: f64,
    /// `[n, n]` row-major, or the diagonal.
    covariance: Vec<f64>,
    /// Evolution paths of the covariance and of the step size.
    path_c: Vec<f64>,
    path_s: Vec<f64>,
}

/// Constants of a problem of `n` dimensions.
struct Rates {
    weights: Vec<f64>,
    mu_eff: f64,
    c_s: f64,
    d_s: f64,
    c_c: f64,
    c_1: f64,
    c_mu: f64,
    /// Expected length of a standard normal vector.
    chi: f64,
}

/// `C^(1/2) z` and `C^(-1/2) y`.
enum Root {
    /// Standard deviations.
    Diagonal(Vec<f64>),
    /// Standard deviations along the columns of a basis `[n, n]`.
    Full(Vec<f64>, Matrix),
}

impl CmaEs {
    /// A search from `mean`.
    ///
    /// # Errors
    /// [`MergeError::Settings`] with everything that is wrong.
    pub fn new(mean: Vec<f64>, config: CmaEsConfig) -> Result<Self, MergeError> {
        let mut problems = Vec::new();
        if mean.is_empty() || mean.iter().any(|v| !v.is_finite()) {
            problems.push("the start is empty or not finite".into());
        }
        if !(config.sigma.is_finite() && config.sigma > 0.0) {
            problems.push(format!("`sigma` is {}", config.sigma));
        }
        if config.population.is_some_and(|p| p < 4) {
            problems.push(format!("`population` is {:?}; it takes at least 4", config.population));
        }
        if !problems.is_empty() {
            return Err(MergeError::Settings { problems });
        }
        let n = mean.len();
        let diagonal = is_diagonal(&config, n);
        let covariance = if diagonal {
            vec![1.0; n]
        } else {
            (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect()
        };
        let sigma = config.sigma;
        let (path_c, path_s) = (vec![0.0; n], vec![0.0; n]);
        Ok(CmaEs { config, generation: 0, mean, sigma, covariance, path_c, path_s })
    }

    /// The centre of the next generation: the best guess of the minimum under noise.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The overall step size.
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    /// Generations told so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Points of a generation.
    pub fn population(&self) -> usize {
        let standard = 4 + (3.0 * (self.mean.len() as f64).ln()).floor() as usize;
        self.config.population.unwrap_or(standard)
    }

    /// The points of the next generation; the same until it is told.
    ///
    /// # Errors
    /// [`MergeError::Settings`] if the covariance has no decomposition, as after costs that drive it out of the range of numbers.
    pub fn ask(&self) -> Result<Vec<Vec<f64>>, MergeError> {
        let root = self.root()?;
        let n = self.mean.len();
        let point = |k: usize| {
            let stream = format!("cma_es/{}/{k}", self.generation);
            let z: Vec<f64> = self.config.seed.normal_f64(&stream, n, 1.0).collect();
            let y = root.times(&z);
            self.mean.iter().zip(y).map(|(m, y)| m + self.sigma * y).collect()
        };
        Ok((0..self.population()).map(point).collect())
    }

    /// Takes the costs of the points of [`CmaEs::ask`], lower is better; one that is not a number is worse than all others.
    ///
    /// # Errors
    /// As [`CmaEs::ask`]; [`MergeError::Settings`] if the points are not those of a generation.
    pub fn tell(&mut self, points: &[Vec<f64>], costs: &[f64]) -> Result<(), MergeError> {
        let n = self.mean.len();
        let fits = points.len() == self.population() && points.iter().all(|p| p.len() == n);
        if !fits || costs.len() != points.len() {
            let expected = self.population();
            let problems = vec![format!(
                "{} points and {} costs for a generation of {expected} points of {n} numbers",
                points.len(),
                costs.len()
            )];
            return Err(MergeError::Settings { problems });
        }
        let root = self.root()?;
        let rates = Rates::new(n, points.len(), matches!(root, Root::Diagonal(_)));
        let mut order: Vec<usize> = (0..points.len()).collect();
        // Stable: of equal costs the first point comes first.
        let key = |i: usize| if costs[i].is_nan() { f64::INFINITY } else { costs[i] };
        order.sort_by(|a, b| key(*a).total_cmp(&key(*b)));
        let step = |i: usize| -> Vec<f64> {
            points[i].iter().zip(&self.mean).map(|(x, m)| (x - m) / self.sigma).collect()
        };
        let steps: Vec<Vec<f64>> = order[..rates.weights.len()].iter().map(|i| step(*i)).collect();
        let mut mean_step = vec![0.0; n];
        for (w, y) in rates.weights.iter().zip(&steps) {
            mean_step.iter_mut().zip(y).for_each(|(m, y)| *m += w * y);
        }
        self.mean.iter_mut().zip(&mean_step).for_each(|(m, y)| *m += self.sigma * y);

        let whitened = root.over(&mean_step);
        let gain = (rates.c_s * (2.0 - rates.c_s) * rates.mu_eff).sqrt();
        self.path_s.iter_mut().zip(&whitened).for_each(|(p, y)| *p = (1.0 - rates.c_s) * *p + gain * y);
        let length = self.path_s.iter().map(|p| p * p).sum::<f64>().sqrt();
        // The path is shorter in the first generations.
        let settled = (1.0 - (1.0 - rates.c_s).powf(2.0 * (self.generation + 1) as f64)).sqrt();
        let stalled = length / settled >= (1.4 + 2.0 / (n as f64 + 1.0)) * rates.chi;
        let gain = if stalled { 0.0 } else { (rates.c_c * (2.0 - rates.c_c) * rates.mu_eff).sqrt() };
        self.path_c.iter_mut().zip(&mean_step).for_each(|(p, y)| *p = (1.0 - rates.c_c) * *p + gain * y);

        // What a stalled path leaves out is made up for.
        let missing = if stalled { rates.c_1 * rates.c_c * (2.0 - rates.c_c) } else { 0.0 };
        let keep = 1.0 - rates.c_1 - rates.c_mu + missing;
        let cell = |old: f64, i: usize, j: usize| {
            let own: f64 = rates.weights.iter().zip(&steps).map(|(w, y)| w * y[i] * y[j]).sum();
            keep * old + rates.c_1 * self.path_c[i] * self.path_c[j] + rates.c_mu * own
        };
        match root {
            Root::Diagonal(_) => {
                (0..n).for_each(|i| self.covariance[i] = cell(self.covariance[i], i, i));
            }
            Root::Full(..) => {
                for i in 0..n {
                    for j in 0..=i {
                        let value = cell(self.covariance[i * n + j], i, j);
                        self.covariance[i * n + j] = value;
                        self.covariance[j * n + i] = value;
                    }
                }
            }
        }
        self.sigma *= (rates.c_s / rates.d_s * (length / rates.chi - 1.0)).min(1.0).exp();
        self.generation += 1;
        Ok(())
    }

    /// Whether this is a state of `n` dimensions with these settings, as one that was read may not be.
    pub(crate) fn fits(&self, n: usize, config: &CmaEsConfig) -> bool {
        let cells = if is_diagonal(&self.config, n) { n } else { n * n };
        let sizes = [&self.mean, &self.path_c, &self.path_s].iter().all(|v| v.len() == n);
        sizes && self.covariance.len() == cells && self.config == *config
    }

    fn root(&self) -> Result<Root, MergeError> {
        let n = self.mean.len();
        let broken =
            |what: String| MergeError::Settings { problems: vec![format!("the search broke down: {what}")] };
        let deviation = |v: f64| v.max(0.0).sqrt().max(f64::MIN_POSITIVE);
        if !(self.sigma.is_finite() && self.sigma > 0.0) {
            return Err(broken(format!("its step size is {}", self.sigma)));
        }
        if is_diagonal(&self.config, n) {
            return Ok(Root::Diagonal(self.covariance.iter().map(|v| deviation(*v)).collect()));
        }
        let matrix = Matrix::from_fn(n, n, |i, j| self.covariance[i * n + j]);
        let eigen = symmetric_eigen(&matrix).map_err(|e| broken(e.to_string()))?;
        Ok(Root::Full(eigen.values.iter().map(|v| deviation(*v)).collect(), eigen.vectors))
    }
}

fn is_diagonal(config: &CmaEsConfig, n: usize) -> bool {
    match config.covariance {
        Covariance::Auto => n > FULL_UP_TO,
        Covariance::Full => false,
        Covariance::Diagonal => true,
    }
}

impl Rates {
    /// The tutorial's defaults, with positive weights only.
    fn new(n: usize, population: usize, diagonal: bool) -> Self {
        let d = n as f64;
        let mu = population / 2;
        let raw: Vec<f64> =
            (1..=mu).map(|i| ((population as f64 + 1.0) / 2.0).ln() - (i as f64).ln()).collect();
        let sum: f64 = raw.iter().sum();
        let weights: Vec<f64> = raw.iter().map(|w| w / sum).collect();
        let mu_eff = 1.0 / weights.iter().map(|w| w * w).sum::<f64>();
        let c_s = (mu_eff + 2.0) / (d + mu_eff + 5.0);
        let d_s = 1.0 + 2.0 * (((mu_eff - 1.0) / (d + 1.0)).sqrt() - 1.0).max(0.0) + c_s;
        let c_c = (4.0 + mu_eff / d) / (d + 4.0 + 2.0 * mu_eff / d);
        let mut c_1 = 2.0 / ((d + 1.3).powi(2) + mu_eff);
        let mut c_mu = 2.0 * (mu_eff - 2.0 + 1.0 / mu_eff) / ((d + 2.0).powi(2) + mu_eff);
        if diagonal {
            // A diagonal has fewer numbers to learn.
            c_1 *= (d + 2.0) / 3.0;
            c_mu *= (d + 2.0) / 3.0;
        }
        c_1 = c_1.min(1.0);
        c_mu = c_mu.min(1.0 - c_1);
        let chi = d.sqrt() * (1.0 - 1.0 / (4.0 * d) + 1.0 / (21.0 * d * d));
        Rates { weights, mu_eff, c_s, d_s, c_c, c_1, c_mu, chi }
    }
}

impl Root {
    fn times(&self, z: &[f64]) -> Vec<f64> {
        match self {
            Root::Diagonal(d) => z.iter().zip(d).map(|(z, d)| z * d).collect(),
            Root::Full(d, basis) => {
                let scaled: Vec<f64> = z.iter().zip(d).map(|(z, d)| z * d).collect();
                (0..z.len())
                    .map(|i| scaled.iter().enumerate().map(|(j, s)| basis[(i, j)] * s).sum())
                    .collect()
            }
        }
    }

    fn over(&self, y: &[f64]) -> Vec<f64> {
        match self {
            Root::Diagonal(d) => y.iter().zip(d).map(|(y, d)| y / d).collect(),
            Root::Full(d, basis) => {
                let n = y.len();
                let along = |j: usize| (0..n).map(|i| basis[(i, j)] * y[i]).sum::<f64>() / d[j];
                let along: Vec<f64> = (0..n).map(along).collect();
                (0..n).map(|i| along.iter().enumerate().map(|(j, a)| basis[(i, j)] * a).sum()).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Minimizes `f` and returns the lowest cost with the evaluations it took to get below `target`, if it did.
    fn minimize(
        start: Vec<f64>,
        config: CmaEsConfig,
        evaluations: usize,
        target: f64,
        f: &dyn Fn(&[f64]) -> f64,
    ) -> (f64, Option<usize>) {
        let mut search = CmaEs::new(start, config).unwrap();
        let (mut lowest, mut done) = (f64::INFINITY, 0);
        while done < evaluations {
            let points = search.ask().unwrap();
            let costs: Vec<f64> = points.iter().map(|x| f(x)).collect();
            search.tell(&points, &costs).unwrap();
            done += points.len();
            lowest = costs.into_iter().fold(lowest, f64::min);
            if lowest < target {
                return (lowest, Some(done));
            }
        }
        (lowest, None)
    }

    fn rosenbrock(x: &[f64]) -> f64 {
        x.windows(2).map(|p| 100.0 * (p[1] - p[0] * p[0]).powi(2) + (1.0 - p[0]).powi(2)).sum()
    }

    /// `sum 10^(6 i / (n - 1)) x_i^2`.
    fn ellipsoid(x: &[f64]) -> f64 {
        let last = (x.len() - 1) as f64;
        x.iter().enumerate().map(|(i, x)| 10f64.powf(6.0 * i as f64 / last) * x * x).sum()
    }

    fn rotated(x: &[f64], rotation: &Matrix) -> Vec<f64> {
        let n = x.len();
        (0..n).map(|i| (0..n).map(|j| rotation[(i, j)] * x[j]).sum()).collect()
    }

    fn rotation(n: usize) -> Matrix {
        firebrick_tensor::linalg::qr(&Matrix::random_normal(n, n, Seed(5), "rotation")).unwrap().q
    }

    #[test]
    fn rosenbrock_in_10_dimensions() {
        for seed in 0..3 {
            let config = CmaEsConfig { sigma: 0.5, seed: Seed(seed), ..CmaEsConfig::default() };
            let (lowest, at) = minimize(vec![0.0; 10], config.clone(), 20_000, 1e-8, &rosenbrock);
            assert!(at.is_some(), "seed {seed}: {lowest}");
            // Control: without rank and path, random search of the same size.
            let draws = Seed(seed).normal_f64("control", 10 * 20_000, 0.5).collect::<Vec<_>>();
            let best = draws.chunks(10).map(rosenbrock).fold(f64::INFINITY, f64::min);
            assert!(best > 1e-2, "control: {best}");
        }
    }

    #[test]
    fn a_rotated_ellipsoid_takes_the_full_covariance() {
        let n = 10;
        let r = rotation(n);
        let f = |x: &[f64]| ellipsoid(&rotated(x, &r));
        for seed in 0..3 {
            let config = |covariance| CmaEsConfig {
                sigma: 0.5,
                covariance,
                seed: Seed(seed),
                ..CmaEsConfig::default()
            };
            let (full, at) = minimize(vec![1.0; n], config(Covariance::Full), 20_000, 1e-8, &f);
            assert!(at.is_some(), "seed {seed}: {full}");
            let (diagonal, _) = minimize(vec![1.0; n], config(Covariance::Diagonal), at.unwrap(), 1e-8, &f);
            assert!(diagonal > 1e3 * full, "control: a diagonal knows no rotation: {diagonal}");
        }
    }

    #[test]
    fn rotations_change_nothing_for_the_full_covariance() {
        // Invariance: the evaluations needed differ by the draws alone.
        let r = rotation(10);
        let config = CmaEsConfig { sigma: 0.5, seed: Seed(3), ..CmaEsConfig::default() };
        let (_, plain) = minimize(vec![1.0; 10], config.clone(), 30_000, 1e-8, &ellipsoid);
        let turned = |x: &[f64]| ellipsoid(&rotated(x, &r));
        let (_, turned) = minimize(vec![1.0; 10], config, 30_000, 1e-8, &turned);
        let ratio = plain.unwrap() as f64 / turned.unwrap() as f64;
        assert!((0.6..1.7).contains(&ratio), "{ratio}");
    }

    #[test]
    fn many_dimensions_are_searched_by_their_diagonal() {
        let n = 300;
        let config = CmaEsConfig { sigma: 0.5, seed: Seed(1), ..CmaEsConfig::default() };
        let f = |x: &[f64]| -> f64 {
            let scale = |i: usize| 10f64.powf(2.0 * i as f64 / (n - 1) as f64);
            x.iter().enumerate().map(|(i, x)| scale(i) * x * x).sum()
        };
        let search = CmaEs::new(vec![1.0; n], config.clone()).unwrap();
        assert_eq!(search.covariance.len(), n);
        let (lowest, at) = minimize(vec![1.0; n], config, 45_000, 1e-6, &f);
        assert!(at.is_some(), "{lowest}");
    }

    #[test]
    fn it_goes_on_from_json_bit_for_bit() {
        let config = CmaEsConfig { seed: Seed(9), ..CmaEsConfig::default() };
        let go = |search: &mut CmaEs, generations: usize| {
            for _ in 0..generations {
                let points = search.ask().unwrap();
                let costs: Vec<f64> = points.iter().map(|x| rosenbrock(x)).collect();
                search.tell(&points, &costs).unwrap();
            }
        };
        let mut whole = CmaEs::new(vec![0.0; 6], config.clone()).unwrap();
        go(&mut whole, 40);
        let mut first = CmaEs::new(vec![0.0; 6], config).unwrap();
        go(&mut first, 17);
        let mut second: CmaEs = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
        assert_eq!(first, second);
        go(&mut second, 23);
        assert_eq!(whole, second);
        assert_ne!(first, second, "control");
    }

    #[test]
    fn settings_and_costs_are_checked() {
        let bad = CmaEsConfig { sigma: 0.0, population: Some(2), ..CmaEsConfig::default() };
        let error = CmaEs::new(vec![f64::NAN], bad).unwrap_err().to_string();
        for part in ["start", "`sigma`", "`population`"] {
            assert!(error.contains(part), "{part} in {error}");
        }
        let mut search = CmaEs::new(vec![0.0; 3], CmaEsConfig::default()).unwrap();
        let points = search.ask().unwrap();
        assert!(search.tell(&points, &[1.0]).is_err());
        // What is not a number is worse than infinite, and harms nothing.
        let mut costs = vec![f64::NAN; points.len()];
        costs[2] = 1.0;
        search.tell(&points, &costs).unwrap();
        assert!(search.ask().unwrap().iter().flatten().all(|v| v.is_finite()));
    }
}
