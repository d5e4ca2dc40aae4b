//! Properties of GGUF files, hostile ones above all.

use super::quantise::Encoding;
use super::write::{Field, Tensor, write};
use super::*;

/// A file with two tensors and one key of each kind.
fn small() -> Vec<u8> {
    let metadata = [
        ("text", Field::Text("a name".to_owned())),
        ("unsigned", Field::Unsigned(7)),
        ("float", Field::Float(0.5)),
        ("flag", Field::Flag(true)),
        ("texts", Field::Texts(vec!["a".to_owned(), String::new(), "ccc".to_owned()])),
        ("integers", Field::Integers(vec![1, -2])),
        ("floats", Field::Floats(vec![0.25])),
    ];
    let metadata = metadata.map(|(key, field)| (key.to_owned(), field));
    let tensors = [
        Tensor { name: "matrix".to_owned(), rows: Some(3), columns: 32, encoding: Encoding::Q8_0 },
        Tensor { name: "vector".to_owned(), rows: None, columns: 5, encoding: Encoding::F32 },
    ];
    let mut out = Vec::new();
    write(&mut out, &metadata, &tensors, |_, row, numbers| {
        numbers.fill(row as f32);
        Ok(())
    })
    .unwrap();
    out
}

#[test]
fn what_was_written_is_read() {
    let file = small();
    let gguf = Gguf::parse(&file).unwrap();
    assert_eq!(gguf.text("text").unwrap(), Some("a name"));
    assert_eq!(gguf.integer("unsigned").unwrap(), Some(7));
    assert_eq!(gguf.number("float").unwrap(), Some(0.5));
    assert_eq!(gguf.flag("flag").unwrap(), Some(true));
    let list = gguf.list("texts").unwrap().unwrap();
    assert_eq!(list.texts().unwrap().collect::<Vec<_>>(), ["a", "", "ccc"]);
    assert!(list.numbers().is_none());
    let numbers = gguf.list("integers").unwrap().unwrap().numbers().unwrap();
    assert_eq!(numbers.collect::<Vec<_>>(), [1.0, -2.0]);
    assert!(matches!(gguf.text("flag"), Err(GgufError::Kind { .. })));
    let tensors: Vec<_> = gguf.tensors.iter().map(|t| (t.name, t.shape.clone(), t.kind.name, t.bytes.len())).collect();
    assert_eq!(tensors, [("matrix", vec![3, 32], "Q8_0", 102), ("vector", vec![5], "F32", 20)]);
}

#[test]
fn every_shorter_or_longer_file_is_refused() {
    let mut file = small();
    for length in 0..file.len() {
        assert!(Gguf::parse(&file[..length]).is_err(), "{length}");
    }
    file.push(0);
    assert!(matches!(Gguf::parse(&file), Err(GgufError::Length { .. })));
}

#[test]
fn no_changed_byte_makes_the_reader_panic_or_read_outside_the_file() {
    let file = small();
    for place in 0..file.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut changed = file.clone();
            changed[place] ^= change;
            if let Ok(gguf) = Gguf::parse(&changed) {
                assert!(gguf.tensors.iter().all(|tensor| tensor.bytes.end <= changed.len()));
                let lists = ["texts", "integers", "floats"].map(|key| gguf.list(key));
                let counted = lists.into_iter().flatten().flatten().map(|list| {
                    list.count() - list.texts().map_or(0, Iterator::count) - list.numbers().map_or(0, Iterator::count)
                });
                assert_eq!(counted.sum::<usize>(), 0, "every member that was counted is there");
            }
        }
    }
}

/// The place of the first occurrence of `what`, and one past it.
fn after(file: &[u8], what: &[u8]) -> usize {
    file.windows(what.len()).position(|window| window == what).unwrap() + what.len()
}

#[test]
fn each_field_that_frames_the_file_is_checked() {
    let file = small();
    let with = |place: usize, bytes: &[u8]| {
        let mut changed = file.clone();
        changed[place..place + bytes.len()].copy_from_slice(bytes);
        Gguf::parse(&changed).unwrap_err()
    };
    assert!(matches!(with(0, b"GGUE"), GgufError::Magic(_)));
    for version in [0_u32, 1, 4, 3_u32.swap_bytes()] {
        assert_eq!(with(4, &version.to_le_bytes()), GgufError::Version(version));
    }
    let huge = u64::MAX.to_le_bytes();
    assert!(matches!(with(8, &huge), GgufError::TooLarge { .. }));
    assert!(matches!(with(16, &huge), GgufError::TooLarge { .. }));
    assert!(matches!(with(24, &huge), GgufError::TooLarge { .. }));
    assert!(matches!(with(24, &900_u64.to_le_bytes()), GgufError::Truncated { .. }));
    // More tensors, or more entries, than there are.
    assert!(Gguf::parse(&[&file[..8], &3_u64.to_le_bytes(), &file[16..]].concat()).is_err());
    with(8, &1_u64.to_le_bytes());
    with(16, &6_u64.to_le_bytes());
    let list = after(&file, b"texts");
    assert!(matches!(with(list, &13_u32.to_le_bytes()), GgufError::Malformed { .. }));
    assert!(matches!(with(list + 4, &9_u32.to_le_bytes()), GgufError::Malformed { .. }));
    assert!(matches!(with(list + 8, &huge), GgufError::Truncated { .. }));
    assert!(matches!(with(after(&file, b"flag") + 4, &[2]), GgufError::Malformed { .. }));
    let tensor = after(&file, b"matrix");
    for dimensions in [0_u32, 1, 3, 5, u32::MAX] {
        with(tensor, &dimensions.to_le_bytes());
    }
    for size in [0_u64, 31, 64, 1 << 40, u64::MAX] {
        assert!(matches!(with(tensor + 4, &size.to_le_bytes()), GgufError::Tensor { .. } | GgufError::Length { .. }));
    }
    for kind in [0_u32, 1, 4, 12, 1000] {
        assert!(matches!(with(tensor + 20, &kind.to_le_bytes()), GgufError::Tensor { .. }));
    }
    for offset in [1_u64, 32, u64::MAX] {
        assert!(matches!(with(tensor + 24, &offset.to_le_bytes()), GgufError::Tensor { .. }));
    }
    assert!(matches!(with(after(&file, b"vector") + 4 + 8 + 4, &0_u64.to_le_bytes()), GgufError::Tensor { .. }));
    assert_eq!(
        with(after(&file, b"matrix") - 6, b"vector"),
        GgufError::Repeated { what: "tensor", name: "vector".into() }
    );
    assert_eq!(with(after(&file, b"flag") - 4, b"text"), GgufError::Repeated { what: "key", name: "text".into() });
    assert!(matches!(with(after(&file, b"flag") - 4, &[0xff; 4]), GgufError::Malformed { .. }));
}

#[test]
fn the_alignment_must_be_a_power_of_two() {
    for (alignment, good) in [(32, true), (8, false), (0, false), (24, false), (1 << 30, false)] {
        let metadata = [("general.alignment".to_owned(), Field::Unsigned(alignment))];
        let tensors =
            ["a", "b"].map(|name| Tensor { name: name.into(), rows: None, columns: 1, encoding: Encoding::F32 });
        let mut out = Vec::new();
        write(&mut out, &metadata, &tensors, |_, _, _| Ok(())).unwrap();
        assert_eq!(Gguf::parse(&out).is_ok(), good, "{alignment}");
    }
}
