//! exp, tanh, sigmoid and erf on every f32 there is: each vector path must have the bits of the definition.
//!
//! `cargo bench -p butterfly-kernels --bench exhaustive [name ...]` takes minutes and ends with status 1 if a bit differs.

use butterfly_kernels::{Path, math};

/// Inputs compared at a time.
const CHUNK: usize = 1 << 16;

type Definition = fn(&mut [f32]);
type All = fn(Path, &mut [f32]);
type Function = (&'static str, Definition, All);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` runs this file too, without the flag that `cargo bench` gives.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let functions: [Function; 4] = [
        ("exp", |x| define(x, math::exp), math::exp_all),
        ("tanh", |x| define(x, math::tanh), math::tanh_all),
        ("sigmoid", |x| define(x, math::sigmoid), math::sigmoid_all),
        ("erf", |x| define(x, math::erf), math::erf_all),
    ];
    let mut differences = 0;
    for (name, definition, all) in functions {
        if arguments.iter().any(|argument| argument == name) || arguments.len() == 1 {
            differences += compare(name, definition, all);
        }
    }
    std::process::exit(i32::from(differences > 0));
}

/// Differences between the definition and every vector path of this machine, over all inputs.
fn compare(name: &str, definition: Definition, all: All) -> u64 {
    let paths: Vec<Path> = Path::available().into_iter().filter(|path| *path != Path::Scalar).collect();
    let mut differences = vec![0u64; paths.len()];
    let (mut expected, mut found) = (vec![0.0; CHUNK], vec![0.0; CHUNK]);
    for start in (0..=u32::MAX).step_by(CHUNK) {
        for (input, bits) in expected.iter_mut().zip(start..=u32::MAX) {
            *input = f32::from_bits(bits);
        }
        let inputs = expected.clone();
        definition(&mut expected);
        for (path, differences) in paths.iter().zip(&mut differences) {
            found.copy_from_slice(&inputs);
            all(*path, &mut found);
            let differ = expected.iter().zip(&found).filter(|(e, f)| e.to_bits() != f.to_bits());
            *differences += differ.count() as u64;
        }
    }
    for (path, differences) in paths.iter().zip(&differences) {
        println!("{name}: {differences} of 4294967296 differ between scalar and {}", path.name());
    }
    differences.iter().sum()
}

/// The definition of each value, compiled for the processor's fused multiply-add where that is known to be there: the
/// operations are the same, and a call of the C library for each is avoided.
#[inline(always)]
fn define(values: &mut [f32], function: impl Fn(f32) -> f32) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        fn fused(values: &mut [f32], function: impl Fn(f32) -> f32) {
            values.iter_mut().for_each(|value| *value = function(*value));
        }
        // SAFETY: the processor has both features.
        return unsafe { fused(values, function) };
    }
    values.iter_mut().for_each(|value| *value = function(*value));
}
