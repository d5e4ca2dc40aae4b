//! A pretrained encoder against the embeddings that another implementation computed. The model is not in the repository:
//! see `support` for how a machine gets it.

use butterfly::model::{Model, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};

use super::{step, support, whole};

#[test]
fn texts_have_the_tokens_and_the_embeddings_of_the_reference() {
    let Some(folder) = support::folder() else { return };
    let model = Model::open(folder.to_str().unwrap(), std::path::Path::new("")).unwrap();
    let slice = whole(&model);
    let pool = Pool::new(2, Path::detect().unwrap());
    for case in support::reference() {
        let tokens = model.tokenizer().unwrap().encode(&case.text).unwrap();
        assert_eq!(tokens.len(), case.tokens, "{:?}", case.text);
        let StepOutput::Vector(found) = step(&slice, &pool, &mut slice.new_sequence(), StepInput::Tokens(&tokens))
        else {
            panic!("no vector");
        };
        case.assert_near(&found);
    }
}
