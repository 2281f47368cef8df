"""Embed pictures and rank them for a question, with a quarter of the visual tokens.

    pip install sentence-transformers
    python examples/embed.py

The embedded model is trained to answer questions, not to embed: its vectors show the calls, and no
quality. Any model of sentence-transformers whose `transformers_model` reads images goes the same
way.
"""

import torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

import tokencomp
from tokencomp import zoo

PATH = str(zoo.model_path("tiny-qwen3-vl"))
FLOAT = {"dtype": "float32"}


class KeptTokens(torch.nn.Module):
    """Stands before a pooling layer: its mean is over the tokens that are left."""

    def __init__(self, handle):
        super().__init__()
        self.handle = handle

    def forward(self, features, **options):
        stats = self.handle.stats
        if stats:  # a batch of text alone has no counts, and nothing has left
            features["attention_mask"] = stats.pooling_mask(features["attention_mask"])
        return features


def main():
    pictures = [Image.open(path).convert("RGB") for path in sorted(zoo.SAMPLES.glob("*.jpg"))]

    embedder = SentenceTransformer(PATH, model_kwargs=FLOAT)
    whole = embedder.encode(pictures, convert_to_tensor=True)
    with tokencomp.patch(embedder.transformers_model, 0.75) as handle:
        pooled = SentenceTransformer(modules=[embedder[0], KeptTokens(handle), embedder[1]])
        vectors = pooled.encode(pictures, convert_to_tensor=True)
        print(handle.stats)
    print("cosine to the vectors of all tokens:", torch.cosine_similarity(vectors, whole).tolist())

    reader = Transformer(PATH, transformer_task="any-to-any", model_kwargs=FLOAT)
    yes, no = (reader.tokenizer.encode(word)[0] for word in (" yes", " no"))
    reranker = CrossEncoder(modules=[reader, LogitScore(yes, no)])
    with tokencomp.patch(reranker.transformers_model, 0.75) as handle:
        for row in reranker.rank("Is there a pink square?", pictures):
            print(f"picture {row['corpus_id']}: {row['score']:.3f}")
        print(handle.stats)


if __name__ == "__main__":
    main()
