//! The names of a GGUF file's tensors, and the order of their rows.
//!
//! Files of architecture `llama` have the rows of the query and key projections reordered, so that the elements that a
//! rotation pairs stand side by side. The kernels pair element `i` of a head with element `i + head_dim / 2`, as the
//! other formats and the other architectures do, so those rows are put back when they are packed.

/// Factors that each frequency of the rotation is divided by, `[head_dim / 2]`; has no counterpart in safetensors.
pub(in crate::model) const ROPE_FACTORS: &str = "rope_freqs.weight";

const MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Stems that are followed by `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name that a tensor has in safetensors; its own where there is none.
pub(in crate::model) fn canonical(name: &str) -> String {
    translate(name, |pair| (pair.0, pair.1), ("blk.", "model.layers.")).unwrap_or_else(|| name.to_owned())
}

/// The name that a tensor of safetensors has in GGUF, if it has one.
pub(in crate::model) fn native(name: &str) -> Option<String> {
    translate(name, |pair| (pair.1, pair.0), ("model.layers.", "blk."))
}

type Pair = (&'static str, &'static str);

fn translate(name: &str, direction: impl Fn(&Pair) -> Pair, layers: Pair) -> Option<String> {
    if let Some((_, to)) = MODEL.iter().map(&direction).find(|(from, _)| *from == name) {
        return Some(to.to_owned());
    }
    let (layer, rest) = name.strip_prefix(layers.0)?.split_once('.')?;
    let (stem, suffix) = rest.rsplit_once('.')?;
    if !matches!(suffix, "weight" | "bias") {
        return None;
    }
    let (_, to) = LAYER.iter().map(&direction).find(|(from, _)| *from == stem)?;
    Some(format!("{}{layer}.{to}.{suffix}", layers.1))
}

/// Whether the rows of a tensor, named as in safetensors, stand side by side by pairs in files of `architecture`; with
/// the number of its heads.
pub(in crate::model) fn paired_heads(architecture: &str, name: &str, heads: usize, kv_heads: usize) -> Option<usize> {
    if architecture != "llama" {
        return None;
    }
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    if stem.ends_with("self_attn.q_proj") {
        Some(heads)
    } else if stem.ends_with("self_attn.k_proj") {
        Some(kv_heads)
    } else {
        None
    }
}

/// Puts rows that stand side by side by pairs back into halves. `row_bytes` of each row; `None` if the heads do not
/// divide the rows evenly.
pub(in crate::model) fn halves(bytes: &[u8], row_bytes: usize, heads: usize) -> Option<Vec<u8>> {
    reorder(bytes, row_bytes, heads, |row, half| (row % half * 2) + row / half)
}

/// The other way round, for writing.
pub(in crate::model) fn paired_row(row: usize, head_dim: usize) -> usize {
    // Row `2 i + h` of a head holds element `i` of half `h`.
    let (head, within) = (row / head_dim, row % head_dim);
    head * head_dim + within / 2 + within % 2 * (head_dim / 2)
}

fn reorder(bytes: &[u8], row_bytes: usize, heads: usize, source: impl Fn(usize, usize) -> usize) -> Option<Vec<u8>> {
    let rows = bytes.len().checked_div(row_bytes)?;
    let head_dim = rows.checked_div(heads)?;
    if head_dim * heads != rows || !head_dim.is_multiple_of(2) {
        return None;
    }
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(row_bytes * head_dim) {
        for row in 0..head_dim {
            let start = source(row, head_dim / 2) * row_bytes;
            out.extend_from_slice(head.get(start..start + row_bytes)?);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for name in ["token_embd.weight", "output.weight", "blk.17.attn_q_norm.weight", "blk.0.attn_k.bias"] {
            assert_eq!(native(&canonical(name)).as_deref(), Some(name));
        }
        assert_eq!(canonical("blk.3.ffn_down.weight"), "model.layers.3.mlp.down_proj.weight");
        for name in ["blk.3.ffn_down.scale", "blk.3", "token_embd", "blk.1.ffn_gate_exps.weight"] {
            assert_eq!(canonical(name), name);
        }
    }

    #[test]
    fn halves_undo_pairs() {
        let (heads, head_dim) = (3, 8);
        let plain: Vec<u8> = (0..heads * head_dim).flat_map(|row| [row as u8, 0xaa]).collect();
        let paired: Vec<u8> = (0..heads * head_dim).flat_map(|row| [paired_row(row, head_dim) as u8, 0xaa]).collect();
        assert_eq!(&paired[..8], [0, 0xaa, 4, 0xaa, 1, 0xaa, 5, 0xaa]);
        assert_eq!(halves(&paired, 2, heads).unwrap(), plain);
        assert_eq!(halves(&paired, 2, 5), None);
        assert_eq!(halves(&paired, 0, 1), None);
    }
}
