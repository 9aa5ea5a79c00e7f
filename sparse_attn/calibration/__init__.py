"""How profiles are learnt: one file per scheme that needs one; ``foveate calibrate`` runs them."""
