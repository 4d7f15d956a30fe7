"""Tests of distcnn; the folders mirror the package."""
