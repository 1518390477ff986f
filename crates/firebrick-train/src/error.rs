//! The error of this crate.

use std::path::{Path, PathBuf};

use firebrick_core::Cancelled;
use firebrick_models::ModelError;
use firebrick_tensor::checkpoint::CheckpointError;

use crate::documents::BadLine;

/// What can go wrong in reading data, training or evaluating.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// A file without text.
    #[error("{}: the file has no text", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A text file that is not UTF-8.
    #[error("{}: not UTF-8: the byte at offset {offset} belongs to no character", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte from the start of the file.
        offset: usize,
    },
    /// Lines of a JSONL file that are no documents.
    #[error("{}", bad_lines(path, lines, *more))]
    JsonLines {
        /// The file.
        path: PathBuf,
        /// The first bad lines.
        lines: Vec<BadLine>,
        /// How many more there are.
        more: usize,
    },
    /// A document in which the tokens to learn can't be told from those that are only read.
    #[error("{0}")]
    Mask(String),
    /// No document has a token to learn.
    #[error("there is nothing to learn: no document has a token that the loss counts")]
    NothingToLearn,
    /// Too few tokens for a single window.
    #[error("{tokens} tokens do not fill one window of {window}")]
    TooShort {
        /// How many tokens there are.
        tokens: usize,
        /// The window, in tokens.
        window: usize,
    },
    /// A text with an id that the model has no embedding for.
    #[error("the text has token {id}, the model knows {vocab}")]
    UnknownToken {
        /// The largest id of the text.
        id: u32,
        /// Rows of the model's embedding.
        vocab: usize,
    },
    /// A model and its reference that do not speak of the same tokens.
    #[error(
        "the model knows {vocab} tokens, the reference {reference}: they can't be compared token by token"
    )]
    Vocabularies {
        /// Rows of the model's embedding.
        vocab: usize,
        /// Rows of the reference's.
        reference: usize,
    },
    /// A text is to be scored without context, and no token stands for the beginning or the end of one.
    #[error("a text without context needs a token that begins or ends a text; the tokenizer has neither")]
    NoContext,
    /// A continuation that the tokenizer joins with the end of its context.
    #[error("`{text}` has no token of its own after its context: the tokenizer joins the two")]
    NoContinuation {
        /// The continuation.
        text: String,
    },
    /// A request whose context or one of whose continuations has no token.
    #[error("request {index} has an empty context or continuation")]
    EmptyRequest {
        /// Which one, counted from 0.
        index: usize,
    },
    /// A continuation that does not fit into what the model may see.
    #[error(
        "a continuation has {tokens} tokens, more than the {longest} of a sequence; give a larger window"
    )]
    TooLong {
        /// Tokens of the continuation.
        tokens: usize,
        /// Tokens of a sequence, at most.
        longest: usize,
    },
    /// An evaluation task that cannot be read or run; every problem is listed.
    #[error("{name}: {}", listed(problems))]
    Task {
        /// The task's file or name.
        name: String,
        /// One line each, with its line and column where it stands in a file.
        problems: Vec<String>,
    },
    /// Settings that cannot be meant; every problem is listed.
    #[error("training settings: {}", listed(problems))]
    Config {
        /// One line each, naming the setting.
        problems: Vec<String>,
    },
    /// No parameter of the module is trainable.
    #[error(
        "the module has no trainable parameter: build it on `device.autodiff()` and set `require_grad` on what is to train"
    )]
    NothingToTrain,
    /// The loss of a step does not depend on any trainable parameter.
    #[error("step {step}: the loss does not depend on any trainable parameter")]
    Untracked {
        /// The step, counted from 1.
        step: usize,
    },
    /// A loss or a gradient norm that is not a finite number; nothing was saved after the last good step.
    #[error("step {step}: the {what} is {value}; lower the learning rate, or clip gradients")]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// There is a checkpoint or a log in the output folder already, and the run was not asked to resume.
    #[error("{}: holds a run up to step {step}; resume it, or choose another folder", path.display())]
    Occupied {
        /// The output folder, or the log in it where there is no checkpoint.
        path: PathBuf,
        /// The step of the checkpoint, or the last one in the log.
        step: usize,
    },
    /// A checkpoint that does not belong to this run; every difference is listed.
    #[error("{}: cannot resume: {}", path.display(), listed(problems))]
    Resume {
        /// The checkpoint's folder.
        path: PathBuf,
        /// One line each, naming the setting or parameter.
        problems: Vec<String>,
    },
    /// An evaluation would record gradients that nobody takes.
    #[error("evaluation with trainable bricks would pile up gradient records: pass `bricks.valid()`")]
    Tracked,
    /// Scores and relevant documents that do not fit together; every problem is listed.
    #[error("retrieval: {}", listed(problems))]
    Retrieval {
        /// One line each, naming the query.
        problems: Vec<String>,
    },
    /// A read-back from the device failed.
    #[error("device: {0}")]
    Device(String),
    /// The model or its tokenizer.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor file of a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Stopped from outside; the checkpoint of the last step is written if there is an output folder.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl TrainError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        TrainError::Io { path: path.to_path_buf(), source }
    }
}

fn listed(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => many.iter().map(|p| format!("\n  - {p}")).collect(),
    }
}

fn bad_lines(path: &Path, lines: &[BadLine], more: usize) -> String {
    let line = |bad: &BadLine| format!("{}:{}: {}", path.display(), bad.line, bad.what);
    match (lines, more) {
        ([one], 0) => line(one),
        (many, more) => {
            let listed: String = many.iter().map(|bad| format!("\n  - {}", line(bad))).collect();
            let rest = if more > 0 { format!("\n  and {more} more") } else { String::new() };
            format!("{}: {} bad lines:{listed}{rest}", path.display(), many.len() + more)
        }
    }
}
