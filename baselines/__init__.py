"""The methods that Realiz3D is compared with (Sec. 5)."""
