//! Writing an encoder as a Hugging Face folder that transformers and sentence-transformers load.

use std::path::Path;

use firebrick_core::write_atomic;
use firebrick_tensor::block::{self, DType};
use firebrick_tensor::checkpoint::{Format, Metadata, TensorSpec, write_safetensors};

use super::EncoderModel;
use crate::error::ModelError;
use crate::export::ExportType;
use crate::family::bert;

impl EncoderModel {
    /// Writes `folder`: `config.json`, `model.safetensors`, the tokenizer's files and those of sentence-transformers. The
    /// folder appears when it is complete.
    ///
    /// # Errors
    /// If a packed type is asked for, the folder exists and is not empty, or a file cannot be written.
    pub fn save(&self, folder: &Path, dtype: ExportType) -> Result<(), ModelError> {
        let dtype = dtype.dtype();
        if dtype.is_packed() {
            return Err(ModelError::Unsupported(format!("{dtype} in a Hugging Face folder")));
        }
        let fail = |e| ModelError::io(folder, e);
        let Some(name) = folder.file_name() else {
            return Err(ModelError::Unsupported(format!("{} is not a path to write to", folder.display())));
        };
        if folder.exists() && std::fs::read_dir(folder).map_err(fail)?.next().is_some() {
            return Err(ModelError::Unsupported(format!("{} exists and is not empty", folder.display())));
        }
        let partial = folder.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        let discard = || match std::fs::remove_dir_all(&partial) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(ModelError::io(&partial, e)),
            _ => Ok(()),
        };
        // What an earlier run left that was killed.
        discard()?;
        let written = self.write(&partial, dtype).and_then(|()| {
            if folder.exists() {
                std::fs::remove_dir(folder).map_err(fail)?;
            }
            std::fs::rename(&partial, folder).map_err(fail)
        });
        if written.is_err() {
            discard()?;
        }
        written
    }

    fn write(&self, folder: &Path, dtype: DType) -> Result<(), ModelError> {
        let torch = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let config = self.encoder.config().to_hf(torch);
        let config = serde_json::to_string_pretty(&config).expect("a map of plain values") + "\n";
        let mut files = vec![("config.json".to_string(), config.into_bytes())];
        files.extend(self.tokenizer.files()?);
        files.extend(self.sentence.files(self.encoder.config().d_model));
        for (name, bytes) in files {
            let path = folder.join(name);
            let parent = firebrick_core::folder(&path);
            std::fs::create_dir_all(parent).map_err(|e| ModelError::io(parent, e))?;
            write_atomic(&path, &bytes).map_err(|e| ModelError::io(&path, e))?;
        }
        let mut tensors = Vec::new();
        for (tensor, shape) in bert::tensors(self.encoder.config()) {
            let values = self.encoder.values(tensor).expect("the encoder has the tensors of its own table");
            let values = values.without_autodiff().into_data().try_into_vec_as::<f32>();
            let values = values.map_err(|e| ModelError::Backend(format!("{e:?}")))?;
            let mut bytes = vec![0; values.len() * dtype.block_bytes()];
            let encoded = block::encode(dtype, &values, &mut bytes);
            encoded.map_err(|e| ModelError::Backend(e.to_string()))?;
            let name = tensor.name(Format::Safetensors).expect("every tensor has a name there");
            tensors.push((TensorSpec::new(name, dtype, shape), bytes));
        }
        // Transformers asks for this.
        let metadata = Metadata::from([("format".to_string(), "pt".to_string())]);
        Ok(write_safetensors(folder.join("model.safetensors"), &metadata, &tensors)?)
    }
}
