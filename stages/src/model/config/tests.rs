//! Properties of parsed configurations.

use super::*;
use serde_json::json;

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 512, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6, "hidden_act": "silu"
    })
}

fn with(changes: Value) -> Result<Config, ConfigError> {
    let mut value = base();
    for (key, change) in changes.as_object().unwrap() {
        value[key] = change.clone();
    }
    Config::parse(value.to_string().as_bytes())
}

fn llama_with(changes: Value) -> LlamaConfig {
    match with(changes).unwrap() {
        Config::Llama(config) => config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_spellings_of_rotation_and_dtype_give_the_same_config() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256, "rope_type": "llama3"});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(500_000.0);
    let new = llama_with(json!({"rope_parameters": parameters, "dtype": "bfloat16"}));
    let old = llama_with(json!({"rope_theta": 500_000.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}));
    assert_eq!(new, old);
    assert_eq!(new.dtype, Some(Dtype::Bf16));
    assert!(matches!(new.rope_scaling, RopeScaling::Llama3 { original_positions: 256, .. }));
}

#[test]
fn what_is_absent_takes_the_default_of_the_family() {
    let config = llama_with(json!({"num_key_value_heads": null}));
    assert_eq!((config.kv_heads, config.head_dim, config.rope_theta), (4, 16, 10_000.0));
    assert!(!config.tied_head && !config.qkv_bias && !config.output_bias && !config.mlp_bias);
    assert_eq!((config.bos, config.eos, config.dtype), (None, vec![], None));
    let qwen = llama_with(json!({"model_type": "qwen2", "use_sliding_window": false, "sliding_window": 128}));
    assert!(qwen.qkv_bias && !qwen.output_bias);
    assert_eq!(llama_with(json!({"eos_token_id": [7, 3, 7]})).eos, vec![3, 7]);
}

#[test]
fn a_qwen3_norms_its_heads_and_says_their_size() {
    let config = llama_with(json!({"model_type": "qwen3", "head_dim": 32, "sliding_window": null}));
    assert!(config.head_norms && !config.qkv_bias && !config.output_bias);
    assert_eq!((config.head_dim, config.heads * config.head_dim), (32, 128), "not the width of the residual");
    assert_eq!(llama_with(json!({"model_type": "qwen3"})).head_dim, 128);
    assert!(!llama_with(json!({})).head_norms);
}

#[test]
fn a_mistral_may_have_a_window_that_covers_its_context() {
    for window in [json!(null), json!(1024), json!(4096)] {
        assert!(!llama_with(json!({"model_type": "mistral", "sliding_window": window})).qkv_bias);
    }
    let error = with(json!({"model_type": "mistral", "sliding_window": 1023})).unwrap_err();
    assert!(matches!(error, ConfigError::Unsupported { field, .. } if field == "sliding_window"));
}

#[test]
fn an_encoder_says_what_is_not_computed() {
    let bert = |changes: Value| {
        let mut value = json!({"model_type": "bert", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
            "intermediate_size": 40, "vocab_size": 100, "max_position_embeddings": 512, "type_vocab_size": 2,
            "layer_norm_eps": 1e-12, "hidden_act": "gelu", "torch_dtype": "float16", "is_decoder": false});
        value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::parse(value.to_string().as_bytes())
    };
    let Ok(Config::Bert(config)) = bert(json!({})) else { panic!("no encoder") };
    assert_eq!((config.hidden, config.context_length, config.dtype), (24, 512, Some(Dtype::F16)));
    for (changes, field) in [
        (json!({"hidden_act": "gelu_new"}), "hidden_act"),
        (json!({"position_embedding_type": "relative_key"}), "position_embedding_type"),
        (json!({"is_decoder": true}), "is_decoder"),
        (json!({"num_attention_heads": 5}), "num_attention_heads"),
        (json!({"max_position_embeddings": 1 << 20}), "max_position_embeddings"),
        (json!({"type_vocab_size": 0}), "type_vocab_size"),
        (json!({"layer_norm_eps": null}), "layer_norm_eps"),
    ] {
        let error = bert(changes).unwrap_err().to_string();
        assert!(error.contains(&format!("'{field}'")), "{field}: {error}");
    }
}

#[test]
fn every_refusal_names_its_field() {
    for (changes, field) in [
        (json!({"model_type": "gpt2"}), "model_type"),
        (json!({"model_type": 7}), "model_type"),
        (json!({"hidden_size": null}), "hidden_size"),
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"hidden_size": -64}), "hidden_size"),
        (json!({"hidden_size": 64.5}), "hidden_size"),
        (json!({"hidden_size": u64::MAX}), "hidden_size"),
        (json!({"num_hidden_layers": "three"}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"num_attention_heads": 5, "num_key_value_heads": 5}), "num_attention_heads"),
        (json!({"head_dim": 15}), "head_dim"),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"sliding_window": 512}), "sliding_window"),
        (json!({"pretraining_tp": 2}), "pretraining_tp"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "tiny"}), "rms_norm_eps"),
        (json!({"rope_parameters": []}), "rope_parameters"),
        (json!({"rope_parameters": {"rope_type": "yarn"}}), "rope_parameters.rope_type"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "rope_scaling.type"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), "rope_scaling.factor"),
        (json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}), "rope_theta"),
        (json!({"rope_theta": -1.0}), "rope_theta"),
        (json!({"dtype": "float64"}), "dtype"),
        (json!({"torch_dtype": "int8"}), "torch_dtype"),
        (json!({"eos_token_id": 512}), "eos_token_id"),
        (json!({"bos_token_id": -1}), "bos_token_id"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"model_type": "mlp"}), "layer_sizes"),
        (json!({"model_type": "mlp", "layer_sizes": [3]}), "layer_sizes"),
        (json!({"model_type": "mlp", "layer_sizes": [3, 0]}), "layer_sizes"),
        (json!({"model_type": "mlp", "layer_sizes": [3, 2]}), "activation"),
        (json!({"model_type": "mlp", "layer_sizes": [3, 2], "activation": "silu"}), "activation"),
    ] {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(error.contains(&format!("'{field}'")), "{changes}: {error}");
    }
}

#[test]
fn text_that_is_no_object_is_refused() {
    let deep = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", "\u{0}", "{\"a\":1}x", deep.as_str()] {
        assert!(matches!(Config::parse(text.as_bytes()), Err(ConfigError::Json(_))), "{text:.20}");
    }
    assert!(matches!(Config::parse(&[0xff, 0xfe]), Err(ConfigError::Json(_))));
}

#[test]
fn a_quoted_value_is_short() {
    let error = with(json!({"hidden_size": "é".repeat(100_000)})).unwrap_err().to_string();
    assert!(error.chars().count() < 200);
}
