//! Named random streams: every draw can be repeated, in any order and on any number of threads.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The seed of a run, from which every random stream is derived by name.
///
/// ```
/// use firebrick_core::Seed;
/// use rand::Rng;
/// let seed = Seed(7);
/// let draw = |name: &str| seed.stream(name).random::<u64>();
/// assert_eq!(draw("lora/layers.3.attn.q"), draw("lora/layers.3.attn.q"));
/// assert_ne!(draw("lora/layers.3.attn.q"), draw("lora/layers.3.attn.k"));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(pub u64);

impl Seed {
    /// The generator of the stream `name`; the same seed and name give the same numbers on every platform.
    pub fn stream(self, name: &str) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(self.digest(name))
    }

    /// `n` draws from the normal distribution with mean 0 and standard deviation `std`, from the stream `name`.
    pub fn normal(self, name: &str, n: usize, std: f64) -> Vec<f32> {
        let mut rng = self.stream(name);
        let draw = |rng: &mut ChaCha8Rng| {
            // Box-Muller; 1 - u is never 0.
            let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
            (std * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        (0..n).map(|_| draw(&mut rng)).collect()
    }

    /// `n` draws from the uniform distribution over `-bound..bound`, from the stream `name`.
    pub fn uniform(self, name: &str, n: usize, bound: f64) -> Vec<f32> {
        let mut rng = self.stream(name);
        (0..n).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
    }

    /// A seed of its own for the part `name` of a run.
    pub fn derive(self, name: &str) -> Seed {
        let bytes = self.digest(name);
        Seed(u64::from_le_bytes(bytes[..8].try_into().expect("8 of 32 bytes")))
    }

    fn digest(self, name: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0.to_le_bytes());
        hasher.update(name.as_bytes());
        *hasher.finalize().as_bytes()
    }
}
