"""How good is it, and how sure: embeddings to ranks to Recall@K, intervals; knows no model."""
