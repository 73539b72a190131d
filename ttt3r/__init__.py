"""TTT3R and CUT3R: recurrent 3D reconstruction, its geometry and its weights."""
