"""How llmd is extended: hookspecs (what may be said), specs (what is said), manager (who says it), catalog (all)."""
