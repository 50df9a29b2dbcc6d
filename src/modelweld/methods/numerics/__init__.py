"""What several methods compute with: exact thresholds, sign election, spectra, random streams, compiled loops."""
