"""Hashes of a text's word shingles, for the search of near-duplicates; without torch."""
