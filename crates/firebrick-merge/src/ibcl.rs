//! IBCL (arXiv 2305.14782): a knowledge base of posteriors from which a model for any preference over tasks follows without training.

use firebrick_core::Seed;

/// A Gaussian with independent coordinates.
#[derive(Clone, Debug, PartialEq)]
pub struct DiagGaussian {
    /// Means, `[n]`.
    pub mean: Vec<f64>,
    /// Standard deviations, `[n]`, above 0.
    pub std: Vec<f64>,
}

/// What a knowledge base cannot answer; every problem is listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("; "))]
pub struct IbclError {
    /// One line each.
    pub problems: Vec<String>,
}

/// Posteriors of the tasks so far: each task points to as many of them as there are priors.
///
/// A posterior that lies no further than [`KnowledgeBase::threshold`] from one of an earlier task is not held itself: the task points to
/// that one, so that the base grows more slowly than the number of tasks.
#[derive(Clone, Debug)]
pub struct KnowledgeBase {
    /// Largest distance at which two posteriors count as one.
    pub threshold: f64,
    posteriors: Vec<DiagGaussian>,
    tasks: Vec<Vec<usize>>,
}

impl DiagGaussian {
    /// What both knowledge base and sampling rely on: as many deviations as means, all numbers, deviations above 0.
    fn problem(&self) -> Option<String> {
        let (n, m) = (self.mean.len(), self.std.len());
        if n != m {
            return Some(format!("{n} means and {m} standard deviations"));
        }
        let good =
            self.mean.iter().all(|x| x.is_finite()) && self.std.iter().all(|x| x.is_finite() && *x > 0.0);
        (!good).then(|| "a mean is not finite, or a standard deviation not above 0".into())
    }

    /// `|mean - mean'| / n + |std - std'| / n`.
    pub fn distance(&self, other: &DiagGaussian) -> f64 {
        let norm = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt();
        (norm(&self.mean, &other.mean) + norm(&self.std, &other.std)) / self.mean.len().max(1) as f64
    }

    /// A draw, `[n]`, from the box that holds the central share `mass` of each coordinate by itself, uniformly. The box holds
    /// `mass^n` of the whole: in many dimensions next to nothing.
    ///
    /// # Panics
    /// If `mass` is not between 0 and 1.
    pub fn sample_box(&self, mass: f64, seed: Seed, name: &str) -> Vec<f64> {
        let reach = central(mass);
        let draws = seed.uniform(name, self.mean.len(), 1.0);
        let coordinates = self.mean.iter().zip(&self.std).zip(draws);
        coordinates.map(|((mean, std), u)| mean + reach * std * f64::from(u)).collect()
    }
}

/// The number of standard deviations to either side that holds the share `mass` of a Gaussian.
fn central(mass: f64) -> f64 {
    assert!(mass > 0.0 && mass < 1.0, "the mass of an interval lies between 0 and 1, not {mass}");
    // Beyond 6 the series below would lose its digits, and nothing of the mass is left.
    let (mut low, mut high) = (0.0, 6.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if erf(middle * std::f64::consts::FRAC_1_SQRT_2) < mass {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

/// The error function by its Maclaurin series, for `0..4.3`.
fn erf(x: f64) -> f64 {
    let (mut power, mut sum) = (x, x);
    for k in 1..200 {
        power *= -x * x / f64::from(k);
        sum += power / f64::from(2 * k + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

impl KnowledgeBase {
    /// An empty base.
    pub fn new(threshold: f64) -> Self {
        KnowledgeBase { threshold, posteriors: Vec::new(), tasks: Vec::new() }
    }

    /// Adds a task with its posteriors, one for each prior; what they became (for a near one that is held, that one) are the
    /// priors of the next task.
    ///
    /// # Errors
    /// No posterior, another number of them or of coordinates than before, means or deviations that can't be meant.
    pub fn add_task(&mut self, posteriors: Vec<DiagGaussian>) -> Result<Vec<DiagGaussian>, IbclError> {
        let mut problems = Vec::new();
        let held = self.tasks.first().map_or(posteriors.len(), Vec::len);
        if posteriors.is_empty() || posteriors.len() != held {
            problems.push(format!("{} posteriors, {} expected", posteriors.len(), held.max(1)));
        }
        let first = self.posteriors.first().or(posteriors.first()).map_or(0, |p| p.mean.len());
        for (i, posterior) in posteriors.iter().enumerate() {
            problems.extend(posterior.problem().map(|p| format!("posterior {i}: {p}")));
            if posterior.mean.len() != first {
                problems.push(format!("posterior {i} has {} coordinates, not {first}", posterior.mean.len()));
            }
        }
        if !problems.is_empty() {
            return Err(IbclError { problems });
        }
        let (mut task, earlier) = (Vec::new(), self.posteriors.len());
        for posterior in posteriors {
            let distances =
                self.posteriors[..earlier].iter().map(|held| held.distance(&posterior)).enumerate();
            let near = distances.min_by(|a, b| a.1.total_cmp(&b.1)).filter(|(_, d)| *d <= self.threshold);
            task.push(near.map_or(self.posteriors.len(), |(i, _)| i));
            if near.is_none() {
                self.posteriors.push(posterior);
            }
        }
        let priors = task.iter().map(|i| self.posteriors[*i].clone()).collect();
        self.tasks.push(task);
        Ok(priors)
    }

    /// How many posteriors are held.
    pub fn held(&self) -> usize {
        self.posteriors.len()
    }

    /// How many tasks there are.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// The model for a preference `[tasks]` (shares, not negative, that add up to 1): means and deviations are the weighted sums of
    /// those of all tasks' posteriors, which is the Wasserstein barycentre of such Gaussians. Linear in the preference, and no training.
    ///
    /// # Errors
    /// Another number of shares than tasks, negative ones, or a sum that is not 1.
    pub fn model(&self, preference: &[f64]) -> Result<DiagGaussian, IbclError> {
        let mut problems = Vec::new();
        if preference.len() != self.tasks.len() || preference.is_empty() {
            problems.push(format!("{} shares for {} tasks", preference.len(), self.tasks.len()));
        }
        if preference.iter().any(|w| !(w.is_finite() && *w >= 0.0)) {
            problems.push("a share is negative or not finite".into());
        }
        let sum: f64 = preference.iter().sum();
        if (sum - 1.0).abs() > 1e-9 {
            problems.push(format!("the shares add up to {sum}, not 1"));
        }
        if !problems.is_empty() {
            return Err(IbclError { problems });
        }
        let n = self.posteriors[0].mean.len();
        let mut model = DiagGaussian { mean: vec![0.0; n], std: vec![0.0; n] };
        for (task, share) in self.tasks.iter().zip(preference) {
            let weight = share / task.len() as f64;
            for posterior in task.iter().map(|i| &self.posteriors[*i]) {
                model.mean.iter_mut().zip(&posterior.mean).for_each(|(sum, x)| *sum += weight * x);
                model.std.iter_mut().zip(&posterior.std).for_each(|(sum, x)| *sum += weight * x);
            }
        }
        Ok(model)
    }
}

/// Settings of [`posterior`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VariationalOptions {
    /// Steps of Adam.
    pub steps: usize,
    /// Learning rate, falling to 0 by the cosine.
    pub learning_rate: f64,
    /// Draws a step.
    pub draws: usize,
    /// Seed of the draws.
    pub seed: Seed,
}

/// The Gaussian with independent coordinates nearest to the posterior of `prior` and data (mean-field variational inference,
/// Blundell et al. 2015, arXiv 1505.05424). `gradient` gives that of the log-likelihood of all data at a point `[n]`.
pub fn posterior(
    prior: &DiagGaussian,
    gradient: &mut dyn FnMut(&[f64]) -> Vec<f64>,
    options: &VariationalOptions,
) -> DiagGaussian {
    let n = prior.mean.len();
    // Means, then logarithms of deviations.
    let mut at: Vec<f64> = prior.mean.iter().copied().chain(prior.std.iter().map(|s| s.ln())).collect();
    let (mut first, mut second) = (vec![0.0; 2 * n], vec![0.0; 2 * n]);
    for step in 0..options.steps {
        let mut slope = vec![0.0; 2 * n];
        for draw in 0..options.draws.max(1) {
            let noise: Vec<f64> = options.seed.normal_f64(&format!("{step}/{draw}"), n, 1.0).collect();
            let point: Vec<f64> = (0..n).map(|i| at[i] + at[n + i].exp() * noise[i]).collect();
            for (i, g) in gradient(&point).into_iter().enumerate() {
                slope[i] += g / options.draws.max(1) as f64;
                slope[n + i] += g * noise[i] * at[n + i].exp() / options.draws.max(1) as f64;
            }
        }
        for i in 0..n {
            let (variance, own) = (prior.std[i].powi(2), (2.0 * at[n + i]).exp());
            slope[i] -= (at[i] - prior.mean[i]) / variance;
            slope[n + i] += 1.0 - own / variance;
        }
        let share = step as f64 / options.steps as f64;
        let rate = options.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * share).cos());
        let t = step as i32 + 1;
        for i in 0..2 * n {
            first[i] = 0.9 * first[i] + 0.1 * slope[i];
            // A short memory: the first gradients, at the width of the prior, are far larger than the last.
            second[i] = 0.99 * second[i] + 0.01 * slope[i] * slope[i];
            let (m, v) = (first[i] / (1.0 - 0.9f64.powi(t)), second[i] / (1.0 - 0.99f64.powi(t)));
            at[i] += rate * m / (v.sqrt() + 1e-8);
        }
    }
    DiagGaussian { mean: at[..n].to_vec(), std: at[n..].iter().map(|s| s.exp()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaussian(mean: f64, std: f64, n: usize) -> DiagGaussian {
        DiagGaussian { mean: (0..n).map(|i| mean + i as f64).collect(), std: vec![std; n] }
    }

    #[test]
    fn a_vertex_is_its_task_and_preferences_are_linear() {
        let mut base = KnowledgeBase::new(0.0);
        for task in 0..3 {
            base.add_task(
                (0..2).map(|j| gaussian(f64::from(10 * task + j), 0.2 + 0.1 * f64::from(j), 4)).collect(),
            )
            .unwrap();
        }
        let one = base.model(&[0.0, 1.0, 0.0]).unwrap();
        assert_eq!(one.mean[0], 10.5, "the mean of the two posteriors of task 1");
        assert!((one.std[0] - 0.25).abs() < 1e-15);
        let (a, b) = (base.model(&[1.0, 0.0, 0.0]).unwrap(), base.model(&[0.0, 0.0, 1.0]).unwrap());
        let mixed = base.model(&[0.25, 0.0, 0.75]).unwrap();
        for i in 0..4 {
            assert!((mixed.mean[i] - 0.25 * a.mean[i] - 0.75 * b.mean[i]).abs() < 1e-12);
        }
        let mut single = KnowledgeBase::new(0.0);
        single.add_task(vec![gaussian(3.0, 0.5, 2)]).unwrap();
        assert_eq!(single.model(&[1.0]).unwrap(), gaussian(3.0, 0.5, 2), "one prior: exactly that posterior");
        for bad in [&[1.0][..], &[0.5, 0.5, 0.5], &[2.0, -1.0, 0.0], &[f64::NAN, 0.0, 1.0]] {
            assert!(base.model(bad).is_err(), "{bad:?}");
        }
        assert!(base.add_task(vec![gaussian(0.0, 0.1, 4)]).is_err(), "one posterior less");
        assert!(
            base.add_task(vec![gaussian(0.0, 0.0, 4), gaussian(0.0, 1.0, 5)]).unwrap_err().problems.len()
                == 2
        );
    }

    #[test]
    fn near_posteriors_are_held_once() {
        let held = |threshold: f64| {
            let mut base = KnowledgeBase::new(threshold);
            for task in 0..4 {
                base.add_task(
                    (0..3).map(|j| gaussian(f64::from(task) + 0.1 * f64::from(j), 0.3, 5)).collect(),
                )
                .unwrap();
            }
            (base.held(), base.tasks())
        };
        let counts: Vec<usize> = [-1.0, 0.05, 0.5, f64::INFINITY].map(|t| held(t).0).into();
        assert_eq!((counts[0], *counts.last().unwrap()), (12, 3), "{counts:?}");
        assert!(counts.is_sorted_by(|a, b| a >= b) && counts[1] > counts[2], "{counts:?}");
        assert_eq!(held(0.5).1, 4);
        let mut base = KnowledgeBase::new(0.1);
        base.add_task(vec![gaussian(0.0, 0.3, 5)]).unwrap();
        let priors = base.add_task(vec![gaussian(0.05, 0.3, 5)]).unwrap();
        assert_eq!(priors, [gaussian(0.0, 0.3, 5)], "the next prior is the one that is held");
    }

    #[test]
    fn boxes_hold_what_they_say() {
        for (mass, expected) in [(0.682_689_492, 1.0), (0.95, 1.959_963_985), (0.99, 2.575_829_304)] {
            assert!((central(mass) - expected).abs() < 1e-6, "{mass}: {}", central(mass));
        }
        let draw = gaussian(0.0, 0.5, 2000).sample_box(0.95, Seed(1), "draw");
        let off: Vec<f64> = draw.iter().enumerate().map(|(i, x)| (x - i as f64) / 0.5).collect();
        let largest = off.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        assert!(largest < 1.96 && largest > 1.9, "{largest}");
        assert!(off.iter().any(|x| *x < -1.0) && off.iter().any(|x| *x > 1.0), "each coordinate by itself");
    }

    /// Three inputs with one-hot designs: the posterior of Bayesian linear regression has independent coordinates.
    #[test]
    fn variational_posteriors_are_the_conjugate_ones() {
        for seed in 0..3 {
            let counts = [3.0, 10.0, 40.0];
            let means: Vec<f64> = Seed(seed).normal_f64("means", 3, 1.0).collect();
            let prior = DiagGaussian { mean: vec![0.0; 3], std: vec![0.8; 3] };
            let noise = 0.25f64;
            let mut gradient =
                |w: &[f64]| (0..3).map(|i| counts[i] * (means[i] - w[i]) / noise).collect::<Vec<f64>>();
            let options =
                VariationalOptions { steps: 1500, learning_rate: 0.02, draws: 32, seed: Seed(seed) };
            let found = posterior(&prior, &mut gradient, &options);
            for i in 0..3 {
                let precision = 1.0 / 0.64 + counts[i] / noise;
                let (mean, std) = (counts[i] / noise * means[i] / precision, precision.powf(-0.5));
                assert!((found.mean[i] - mean).abs() < 1e-2, "mean {i}: {} against {mean}", found.mean[i]);
                assert!((found.std[i] / std - 1.0).abs() < 0.05, "std {i}: {} against {std}", found.std[i]);
                assert!((means[i] - mean).abs() > 1e-3 || counts[i] > 20.0, "control: the prior pulls");
            }
        }
    }
}
