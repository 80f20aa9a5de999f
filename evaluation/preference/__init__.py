"""Human preference study (App. E.1, E.3): pairs, votes, ratings."""
