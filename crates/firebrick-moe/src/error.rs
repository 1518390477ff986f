//! The error of this crate.

/// What can go wrong in building a mixture of experts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoeError {
    /// Settings that cannot be meant; every problem is listed.
    #[error("mixture of experts: {}", problems.join("; "))]
    Settings {
        /// One line each, naming the setting.
        problems: Vec<String>,
    },
    /// One expert per token with renormalized weights: every weight is 1, whatever the router says.
    #[error(
        "top_k 1 with renormalized weights gives the router no gradient; raise top_k, or do not renormalize"
    )]
    NoRouterGradient,
    /// Tensors that do not fit together; every problem is listed.
    #[error("mixture of experts: {}", problems.join("; "))]
    Shapes {
        /// One line each, naming the layer and the tensor.
        problems: Vec<String>,
    },
    /// Layers that the model does not have.
    #[error("there are no layers {missing:?}: the model has {layers}")]
    NoSuchLayer {
        /// The layers asked for.
        missing: Vec<usize>,
        /// How many layers there are.
        layers: usize,
    },
    /// A router's tensors could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] firebrick_tensor::checkpoint::CheckpointError),
    /// A router's file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
}
