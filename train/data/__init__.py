"""Pictures and captions: drawn on the fly (shapes, scenes) or read from disk (parquet, image folder)."""
