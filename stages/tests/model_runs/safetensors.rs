//! Writes small weight files and folders around them.

use std::fmt::Write as _;
use std::path::Path;

/// A safetensors file of f32 tensors.
pub(crate) fn file(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (String::from("{"), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let (separator, end) = (if start == 0 { "" } else { "," }, data.len());
        write!(header, r#"{separator}"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
            .unwrap();
    }
    header.push('}');
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A folder with a configuration and weights.
pub(crate) fn folder(config: &serde_json::Value, weights: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, weights);
    folder
}

fn write(folder: &Path, config: &serde_json::Value, weights: &[u8]) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), weights).unwrap();
}
