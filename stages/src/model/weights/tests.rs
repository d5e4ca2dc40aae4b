//! Properties of weight files, hostile ones above all.

use super::super::source::Bytes;
use super::*;

fn part(name: &str, bytes: Vec<u8>) -> Part {
    Part { file: format!("folder/{name}"), name: name.to_owned(), bytes: Bytes::Owned(bytes) }
}

fn loading(parts: &[Part]) -> Loading<'_> {
    Loading::new(parts, [0; 32], None, 0)
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Weights, WeightsError> {
    Weights::open(&[part("a", bytes)], None)
}

const ONE: &str = r#"{"w":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}"#;

#[test]
fn a_whole_file_opens_and_every_shorter_or_longer_one_is_refused() {
    let whole = file(ONE, &[0; 12]);
    let weights = open(whole.clone()).unwrap();
    assert_eq!(weights.check("w", &[2, 3], Some(Dtype::F16)).unwrap(), Dtype::F16);
    for length in 0..whole.len() {
        let error = open(whole[..length].to_vec()).unwrap_err();
        assert!(matches!(error, WeightsError::Length { .. }), "{length}: {error}");
    }
    let mut longer = whole;
    longer.push(0);
    assert!(matches!(open(longer).unwrap_err(), WeightsError::Length { expected: 77, found: 78, .. }));
}

#[test]
fn hostile_headers_are_refused() {
    let huge = u64::MAX;
    for header in [
        String::new(),
        "[]".to_owned(),
        "{".to_owned(),
        "\u{0}".to_owned(),
        format!(r#"{{"w":{{"dtype":"F16","shape":[{huge},{huge}],"data_offsets":[0,12]}}}}"#),
        format!(r#"{{"w":{{"dtype":"F16","shape":[6],"data_offsets":[0,{huge}]}}}}"#),
        r#"{"w":{"dtype":"F16","shape":[6],"data_offsets":[12,0]}}"#.to_owned(),
        r#"{"w":{"dtype":"F16","shape":[5],"data_offsets":[2,12]}}"#.to_owned(),
        r#"{"w":{"dtype":"F16","shape":[6],"data_offsets":[0,10]}}"#.to_owned(),
        r#"{"w":{"dtype":"F99","shape":[6],"data_offsets":[0,12]}}"#.to_owned(),
        r#"{"w":{"dtype":"F16","shape":[-6],"data_offsets":[0,12]}}"#.to_owned(),
        r#"{"w":7}"#.to_owned(),
        r#"{"v":{"dtype":"F16","shape":[6],"data_offsets":[0,12]},"w":{"dtype":"F16","shape":[6],"data_offsets":[0,12]}}"#
            .to_owned(),
        "[".repeat(100_000),
    ] {
        let error = open(file(&header, &[0; 12])).unwrap_err();
        assert!(matches!(error, WeightsError::Header { .. }), "{header:.60}: {error}");
    }
    let mut bytes = file(ONE, &[0; 12]);
    bytes[..8].copy_from_slice(&(HEADER_BYTES_MAX as u64 + 1).to_le_bytes());
    assert!(matches!(open(bytes.clone()).unwrap_err(), WeightsError::Header { .. }));
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(open(bytes).unwrap_err(), WeightsError::Header { .. }));
}

#[test]
fn no_single_changed_byte_of_a_header_makes_it_panic() {
    let whole = file(ONE, &[0; 12]);
    for place in 0..8 + ONE.len() {
        for byte in [0, b'0', b'9', b'"', b'{', 0x7f, 0xff] {
            let mut bytes = whole.clone();
            bytes[place] = byte;
            if let Ok(weights) = open(bytes) {
                let _ = weights.check("w", &[2, 3], Some(Dtype::F16));
            }
        }
    }
}

#[test]
fn a_name_that_appears_twice_is_refused() {
    let twice = r#"{"w":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"w":{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]}}"#;
    assert!(matches!(open(file(twice, &[0; 12])).unwrap_err(), WeightsError::Duplicate { other: None, .. }));
    let parts = [part("a", file(ONE, &[0; 12])), part("b", file(ONE, &[0; 12]))];
    let error = Weights::open(&parts, None).unwrap_err().to_string();
    assert_eq!(error, "folder/b: tensor 'w' appears twice, also in folder/a");
}

#[test]
fn what_does_not_fit_the_configuration_is_named() {
    let weights = open(file(ONE, &[0; 12])).unwrap();
    for (tensor, shape, dtype, text) in [
        ("v", &[2, 3][..], None, "folder/a: tensor 'v' is missing; expected shape [2, 3]"),
        ("w", &[3, 2], None, "folder/a: tensor 'w': expected shape [3, 2], found [2, 3]"),
        ("w", &[6], None, "folder/a: tensor 'w': expected shape [6], found [2, 3]"),
        ("w", &[2, 3], Some(Dtype::F32), "folder/a: tensor 'w': expected F32, found F16"),
    ] {
        assert_eq!(weights.check(tensor, shape, dtype).unwrap_err().to_string(), text);
    }
    let integers = r#"{"w":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]}}"#;
    let error = open(file(integers, &[0; 6])).unwrap().check("w", &[2, 3], None).unwrap_err().to_string();
    assert_eq!(error, "folder/a: tensor 'w': expected F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, found I8");
}

#[test]
fn the_first_weight_that_is_not_finite_is_named() {
    for (dtype, name, values) in [
        (Dtype::F32, "F32", [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|x| x.to_le_bytes().to_vec())),
        (Dtype::F16, "F16", [0x7e00_u16, 0x7c00, 0xfc00].map(|x| x.to_le_bytes().to_vec())),
        (Dtype::Bf16, "BF16", [0x7fc0_u16, 0x7f80, 0xff80].map(|x| x.to_le_bytes().to_vec())),
    ] {
        let size = dtype.block_bytes();
        let header = format!(r#"{{"w":{{"dtype":"{name}","shape":[5],"data_offsets":[0,{}]}}}}"#, 5 * size);
        for value in values {
            let mut data = vec![0x3f; 5 * size];
            data[3 * size..4 * size].copy_from_slice(&value);
            let parts = [part("a", file(&header, &data))];
            let weights = Weights::open(&parts, None).unwrap();
            for error in [
                weights.vector(&loading(&parts), "w", 5, Some(dtype)).unwrap_err(),
                Weights::open(&[part("a", file(&header.replace("[5]", "[5,1]"), &data))], None)
                    .unwrap()
                    .matrix(&loading(&[part("a", file(&header.replace("[5]", "[5,1]"), &data))]), "w", [5, 1], None)
                    .unwrap_err(),
            ] {
                assert!(matches!(error, WeightsError::NotFinite { element: 3, .. }), "{error}");
            }
            data[3 * size..4 * size].fill(0x3f);
            let parts = [part("a", file(&header, &data))];
            assert_eq!(weights.vector(&loading(&parts), "w", 5, Some(dtype)).unwrap().len(), 5);
        }
    }
}

#[test]
fn index_and_files_must_name_the_same_tensors() {
    let parts = [part("a", file(ONE, &[0; 12])), part("b", file(&ONE.replace('w', "v"), &[0; 12]))];
    let index = |text: &str| serde_json::from_str::<Index>(text).unwrap();
    let good = index(r#"{"weight_map":{"w":"a","v":"b"}}"#);
    assert_eq!(Weights::open(&parts, Some(&good)).unwrap().names().collect::<Vec<_>>(), ["v", "w"]);
    for (text, message) in [
        (r#"{"weight_map":{"w":"b","v":"b"}}"#, "folder/a: the index says that tensor 'w' is in 'b'"),
        (r#"{"weight_map":{"v":"b"}}"#, "folder/a: the index says that tensor 'w' does not exist"),
        (
            r#"{"weight_map":{"w":"a","v":"b","u":"b"}}"#,
            "folder/b: the index says that tensor 'u' is here, and it is not",
        ),
    ] {
        assert_eq!(Weights::open(&parts, Some(&index(text))).unwrap_err().to_string(), message);
    }
}
