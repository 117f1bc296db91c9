// clang includes it first; none of its declarations is used
