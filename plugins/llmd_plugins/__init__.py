"""The built-in features of llmd, each a plugin of the same kind as a third party's wheel."""
