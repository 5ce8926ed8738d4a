"""The math behind typed signatures: contracts per op family, a reference in torch, faster backends."""
