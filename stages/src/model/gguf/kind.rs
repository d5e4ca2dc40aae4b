//! The element types that tensors of a GGUF file may have.
//!
//! Every type of the format is listed with its size, so that a file's directory can be checked as a whole even where
//! this build cannot compute with one of its tensors.

use butterfly_kernels::Dtype;

/// An element type: so many numbers in so many bytes.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::model) struct TensorKind {
    /// As the format numbers it.
    pub(in crate::model) code: u32,
    /// As ggml spells it.
    pub(in crate::model) name: &'static str,
    /// Numbers of a block.
    pub(in crate::model) block: usize,
    /// Bytes of a block.
    pub(in crate::model) block_bytes: usize,
}

const fn kind(code: u32, name: &'static str, block: usize, block_bytes: usize) -> TensorKind {
    TensorKind { code, name, block, block_bytes }
}

const KINDS: [TensorKind; 33] = [
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(9, "Q8_1", 32, 36),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(15, "Q8_K", 256, 292),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(24, "I8", 1, 1),
    kind(25, "I16", 1, 2),
    kind(26, "I32", 1, 4),
    kind(27, "I64", 1, 8),
    kind(28, "F64", 1, 8),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
    kind(34, "TQ1_0", 256, 54),
    kind(35, "TQ2_0", 256, 66),
    kind(39, "MXFP4", 32, 17),
    kind(40, "NVFP4", 64, 36),
];

impl TensorKind {
    /// The type with this number.
    pub(in crate::model) fn of(code: u32) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.code == code)
    }

    /// What the kernels call it, if they compute with it.
    pub(in crate::model) fn dtype(&self) -> Option<Dtype> {
        match self.name {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::Bf16),
            "Q8_0" => Some(Dtype::Q8_0),
            "Q4_0" => Some(Dtype::Q4_0),
            "Q4_K" => Some(Dtype::Q4K),
            "Q5_K" => Some(Dtype::Q5K),
            "Q6_K" => Some(Dtype::Q6K),
            _ => None,
        }
    }
}
